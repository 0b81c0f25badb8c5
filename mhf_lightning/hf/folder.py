"""Folders for transformers: written from a trained run, and read as a start for training."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from mhf_lightning.checkpoint.files import appearing, write_tensors
from mhf_lightning.checkpoint.trained import Trained, Vocabulary, read_vocabulary
from mhf_lightning.data.tokenizer import vocab_size_of
from mhf_lightning.hf.authors import open_authors, read_authors
from mhf_lightning.hf.card import model_card
from mhf_lightning.hf.llama import decoder_config, from_llama
from mhf_lightning.hf.model import FlashMHFConfig, FlashMHFForCausalLM
from mhf_lightning.model import Decoder, DecoderConfig


def export_hf(trained: Trained, output: Path, *, data: Path | None, dtype: str, max_shard_size: str) -> None:
    """Write config.json, safetensors, tokenizer files and a model card.

    Args:
        trained: The model.
        output: The folder, which appears when it is complete.
        data: Dataset with the tokenizer; None is that of the run.
        dtype: A name of torch to round the weights to, or ``saved``.
        max_shard_size: Of a safetensors file, such as ``5GB``.

    Raises:
        ValueError: The folder exists, or the tokenizer is missing or does not match.
    """
    if output.exists():
        raise ValueError(f"{output} exists; move it away, or give another OUT")
    if not re.fullmatch(r"\d+[KMGT]?B", max_shard_size):
        raise ValueError(f"--max_shard_size is {max_shard_size!r}; give a number with KB, MB or GB, such as 5GB")
    vocabulary = read_vocabulary(trained, data)
    config = FlashMHFConfig.from_decoder(
        trained.config,
        max_position_embeddings=vocabulary.context_length,
        bos_token_id=vocabulary.eos_id,  # in the training data each document follows one
        eos_token_id=vocabulary.eos_id,
        pad_token_id=vocabulary.eos_id,
    )
    with torch.device("meta"):
        model = FlashMHFForCausalLM(config)
    model.model = trained.decoder(dtype=None if dtype == "saved" else getattr(torch, dtype))
    logging.disable_progress_bar()
    with appearing(output) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        tokenizer_of(vocabulary).save_pretrained(unfinished)
        card = unfinished / "README.md"
        card.write_text(model_card(trained, vocabulary, dtype), encoding="utf-8")
        for file in unfinished.iterdir():  # safetensors makes its files for their owner alone, whatever the umask
            shutil.copymode(card, file)


def tokenizer_of(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Wrap a dataset's tokenizer: the same tokens of any text, and padding on the left, as generation wants it."""
    eos = vocabulary.eos_token
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary.tokenizer,
        bos_token=eos,
        eos_token=eos,
        pad_token=eos,
        padding_side="left",
        model_max_length=vocabulary.context_length,
        split_special_tokens=True,  # text that spells EOS is text
        clean_up_tokenization_spaces=False,
    )


def import_hf(folder: Path, output: Path) -> tuple[DecoderConfig, str]:
    """Turn a folder of transformers into weights and configuration that ``mhf fit`` starts from.

    ``output`` gets ``model.safetensors``, ``model.yaml`` and, where the folder has one, ``tokenizer.json``.

    Args:
        folder: Of a FlashMHFForCausalLM, of a LlamaForCausalLM without biases and with plain rotary embeddings, or of
            such a Llama with the FlashMHF module of the paper's authors.
        output: The folder to write.

    Returns:
        The architecture, and what was read, in words.

    Raises:
        ValueError: ``output`` exists, or the folder is damaged, of an unknown architecture, or has another tokenizer.
    """
    if output.exists():
        raise ValueError(f"{output} exists; move it away, or give another OUT")
    about = folder / "config.json"
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{about} cannot be read ({error!r}); give the folder of a Hugging Face model") from error
    if files := open_authors(folder):  # whatever they call it
        name = "a model of the paper's authors"
        config, weights = read_authors(folder, files, content)
    elif model_type in ("flash_mhf", "llama"):
        name = f"a {model_type} model"
        config, weights = _read_with_transformers(folder, model_type)
    else:
        raise ValueError(
            f"{about} is of the architecture {model_type!r}; known are flash_mhf and llama, and that of the paper's "
            "authors by the names of the tensors in model*.safetensors"
        )
    _check_tokenizer(folder, config)
    with torch.device("meta"):
        expected = Decoder(config).state_dict()
    _check_names(folder, {name for name, _ in _shapes(expected).items() ^ _shapes(weights).items()})
    decoder = config.to_dict()
    decoder["ffn"] = {key: value for key, value in decoder["ffn"].items() if value is not None}
    start = {"model": {"init_from": os.path.abspath(output / "model.safetensors"), "decoder": decoder}}
    text = f"# From {folder}, {name}, for mhf fit --config\n{yaml.safe_dump(start, sort_keys=False)}"
    with appearing(output) as unfinished:
        unfinished.mkdir()
        write_tensors(unfinished / "model.safetensors", weights)
        (unfinished / "model.yaml").write_text(text, encoding="utf-8")
        if (folder / "tokenizer.json").exists():
            shutil.copyfile(folder / "tokenizer.json", unfinished / "tokenizer.json")
    return config, name


def _read_with_transformers(folder: Path, model_type: str) -> tuple[DecoderConfig, dict[str, Tensor]]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what transformers warns of is refused here
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        source = AutoConfig.from_pretrained(folder, **local)
        config = source.to_decoder() if isinstance(source, FlashMHFConfig) else decoder_config(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, **local
        )
    except (ImportError, OSError, RuntimeError, TypeError, SafetensorError, StrictDataclassError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} cannot be read as a {model_type} model: {first}") from error
    model, loading = loaded
    _check_names(
        folder,
        {str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[kind]},
    )
    weights = model.state_dict()
    if model_type == "llama":
        return config, from_llama(weights)
    return config, {key.removeprefix("model."): tensor for key, tensor in weights.items()}


def _check_names(folder: Path, wrong: set[str]) -> None:
    if wrong:
        names = ", ".join(sorted(wrong)[:5])
        raise ValueError(f"{folder} does not hold the weights that its config.json describes: {names}")


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _check_tokenizer(folder: Path, config: DecoderConfig) -> None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    try:
        tokens = vocab_size_of(Tokenizer.from_file(str(path)))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{path} cannot be read ({error})") from error
    if tokens > config.vocab_size:
        raise ValueError(
            f"{path} has {tokens} tokens, the model only {config.vocab_size}: it is of another model; remove it"
        )
