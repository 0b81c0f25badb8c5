"""The models of the paper's authors: a Llama whose ``mlp`` is their module, known by the names of its tensors.

The layer's sizes are read from the shapes of its tensors, the rest from the keys of ``config.json`` that a Llama has.
Of the smaller switches of their module, which no tensor shows, only the released setting, off, is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from mhf_kernels.authors import from_authors, to_authors
from torch import Tensor
from transformers import LlamaConfig

from mhf_lightning.checkpoint.files import TensorFile, appearing, write_json, write_tensors
from mhf_lightning.checkpoint.trained import Trained
from mhf_lightning.hf.llama import decoder_config, from_llama, to_llama
from mhf_lightning.model import DecoderConfig, FFNConfig

_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "attention_bias", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)


def open_authors(folder: Path) -> list[TensorFile]:
    """Open the safetensors of a folder if they are of the authors' module; else return nothing."""
    files = [TensorFile(path) for path in sorted(folder.glob("model*.safetensors"))]
    is_theirs = any("model.layers.0.mlp.gate_weight" in file.names() for file in files)
    return files if is_theirs else []


def read_authors(
    folder: Path, files: list[TensorFile], about: Mapping[str, Any]
) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Read architecture and weights, under our names.

    Args:
        folder: For errors.
        files: Of :func:`open_authors`.
        about: What their ``config.json`` holds.

    Raises:
        ValueError: ``config.json`` lacks the number of attention heads, or says what the decoder has not; a layer is
            incomplete.
    """
    if "num_attention_heads" not in about:
        raise ValueError(f"{folder / 'config.json'} has no num_attention_heads, which the shape of no tensor tells")
    stored = {
        name: file.read(name)
        for file in files
        for name in file.names()
        if not name.endswith(".rotary_emb.inv_freq")  # no weight; older Llamas store it
    }
    try:
        weights = from_llama(from_authors(stored))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    num_kuv_heads, num_subnetworks, d_e, _ = weights["blocks.0.ffn.k"].shape
    ffn = FFNConfig(
        "flash_mhf",
        num_heads=weights["blocks.0.ffn.router"].shape[0],
        num_subnetworks=num_subnetworks,
        d_e=d_e,
        num_kuv_heads=num_kuv_heads,
        query_norm="blocks.0.ffn.q_norm.weight" in weights,
        skip_linear="blocks.0.ffn.w_in.weight" not in weights,
    )
    try:
        llama = decoder_config(LlamaConfig(**{key: about[key] for key in _KEYS if key in about}))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    if llama.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    return replace(llama, ffn=ffn, initialization="paper"), weights


def export_authors(trained: Trained, output: Path) -> None:
    """Write ``model.safetensors`` under the authors' names, and ``config.json`` with a Llama's keys.

    Args:
        trained: A model with FlashMHF layers.
        output: The folder, which appears when it is complete.

    Raises:
        ValueError: The folder exists, or the layers are others.
    """
    config, ffn = trained.config, trained.config.ffn
    if ffn.name != "flash_mhf":
        raise ValueError(f"{trained.checkpoint} has {ffn.name} layers; the authors' names are those of flash_mhf alone")
    if ffn.gate == "softmax":
        raise ValueError(f"{trained.checkpoint} has a softmax gate; the authors' module has the sigmoid one alone")
    weights = to_authors(to_llama(trained.weights))
    if config.tie_embeddings:
        weights.pop("lm_head.weight")
    about = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": weights["model.layers.0.mlp.gate_weight"].shape[0],
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    with appearing(output) as unfinished:
        unfinished.mkdir()
        write_tensors(unfinished / "model.safetensors", weights)
        write_json(unfinished / "config.json", about)
