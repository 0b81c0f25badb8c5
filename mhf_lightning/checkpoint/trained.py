"""A trained model as its run folder holds it: weights, architecture and step from a checkpoint, and the tokenizer.

Imports ``files.py``, ``folder.py``, ``shards.py``, the model, the data package and runs. Nothing in the files is
executed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer
from torch import Tensor

from mhf_lightning.checkpoint.files import CheckpointError
from mhf_lightning.checkpoint.folder import find_newest_valid, verify
from mhf_lightning.checkpoint.shards import Reader, read_trainer
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import Manifest, check_file
from mhf_lightning.data.tokenizer import load_tokenizer
from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.runs import last_config

_WEIGHTS = "model/decoder."  # what PretrainModule's decoder is called in a checkpoint
_DATA = "TokenDataModule"  # and the state of the data


@dataclass(frozen=True)
class Trained:
    """A model as it was saved.

    Attributes:
        run_dir: Folder of the run; None where the checkpoint lies in none.
        checkpoint: The folder that was read.
        config: Architecture.
        weights: By the names of :class:`~mhf_lightning.model.Decoder`; a tied head stands there too.
        step: Optimiser steps done.
        tokens_seen: Tokens trained on.
        tokenizer_sha256: Of the file that its tokens are of; None where the checkpoint does not say.
    """

    run_dir: Path | None
    checkpoint: Path
    config: DecoderConfig
    weights: dict[str, Tensor]
    step: int
    tokens_seen: int | None
    tokenizer_sha256: str | None

    def decoder(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Decoder:
        """Build the model, in evaluation mode; by default as saved, on the CPU.

        Raises:
            CheckpointError: The weights do not fit the architecture.
        """
        with torch.device("meta"):
            decoder = Decoder(self.config)
        try:
            decoder.load_state_dict(self.weights, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{self.checkpoint} does not fit its own architecture: {error}") from error
        if self.config.tie_embeddings:
            decoder.head.weight = decoder.embedding.weight
        return decoder.requires_grad_(False).eval().to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Vocabulary:
    """How a model reads text: the tokenizer of its dataset, the token that ends documents, and L of the blocks."""

    path: Path
    tokenizer: Tokenizer
    eos_token: str
    eos_id: int
    context_length: int


def find_checkpoint(run: Path) -> Path:
    """Return the newest valid checkpoint of a run folder, or the checkpoint itself where ``run`` is one (``step-N``).

    Says on stderr which newer ones are damaged.

    Raises:
        CheckpointError: There is none, or none is valid.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run} is no folder; give that of a run, or a checkpoint (.../checkpoints/step-N)")
    if re.fullmatch(r"step-\d+", run.name):
        verify(run)
        return run
    path, skipped = find_newest_valid(run / "checkpoints")
    for message in skipped:
        print(f"mhf: warning: skipped a checkpoint: {message}", file=sys.stderr)
    if path is None:
        raise CheckpointError(
            f"{run} holds no checkpoint: the run has not saved yet (mhf fit --checkpoint.every_n_steps), or it is "
            "another folder"
        )
    return path


def read_trained(run: Path) -> Trained:
    """Read the newest valid checkpoint of a run folder, or one that is named, as :func:`find_checkpoint`.

    Raises:
        CheckpointError: There is none, or it is damaged or DeepSpeed's.
    """
    checkpoint = find_checkpoint(run)
    manifest = verify(checkpoint)
    if manifest.kind != "sharded":
        raise CheckpointError(
            f"{checkpoint} is a {manifest.kind} checkpoint, which only DeepSpeed reads: "
            f"run python {checkpoint}/zero_to_fp32.py {checkpoint} OUTPUT --tag checkpoint"
        )
    reader, trainer = Reader(checkpoint), read_trainer(checkpoint)
    shapes = sorted(reader.shapes(_WEIGHTS).items())
    weights = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in shapes}
    reader.load({_WEIGHTS + name: tensor for name, tensor in weights.items()})
    reader.close()
    try:
        config = DecoderConfig.from_dict(trainer["decoder_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} has no architecture that this version knows: {error!r}") from error
    folder = checkpoint.resolve().parent
    run_dir = (run if run != checkpoint else folder.parent) if folder.name == "checkpoints" else None
    tokenizer = trainer.get(_DATA, {}).get("tokenizer_sha256")
    return Trained(run_dir, checkpoint, config, weights, manifest.step, trainer.get("tokens_seen"), tokenizer)


def read_vocabulary(trained: Trained, data: Path | None = None) -> Vocabulary:
    """Read the tokenizer of a model's dataset.

    Args:
        trained: The model.
        data: The prepared dataset; by default the one that the run's configuration names.

    Raises:
        DataError: It is not there, damaged, not the one that the model was trained with, or of more tokens than the
            model has.
    """
    if data is None:
        data = _dataset_of(trained)
    manifest = Manifest.load(data)
    check_file(data, manifest.tokenizer, hashed=True)
    if trained.tokenizer_sha256 not in (None, manifest.tokenizer.sha256):
        raise DataError(
            f"the tokenizer of {data} (sha256 {manifest.tokenizer.sha256[:12]}) is not the one that the model of "
            f"{trained.checkpoint} was trained with (sha256 {trained.tokenizer_sha256[:12]}). Give the dataset that it "
            "was trained on, or a copy, with --data."
        )
    if manifest.vocab_size > trained.config.vocab_size:
        raise DataError(
            f"the tokenizer of {data} has {manifest.vocab_size} tokens, the model of {trained.checkpoint} only "
            f"{trained.config.vocab_size}: it was trained with another. Give its dataset with --data."
        )
    tokenizer = load_tokenizer(data / manifest.tokenizer.file, manifest.eos_token)
    return Vocabulary(
        data / manifest.tokenizer.file, tokenizer, manifest.eos_token, manifest.eos_id, manifest.context_length
    )


def _dataset_of(trained: Trained) -> Path:
    """``data.path`` of the run's last start."""
    path = last_config(trained.run_dir) if trained.run_dir is not None else None
    if path is None:
        raise DataError(f"{trained.checkpoint} lies in no run folder with a config.yaml. Give the dataset with --data.")
    try:  # it may refer to environment variables
        config: Any = OmegaConf.load(path)
        data = Path(config["data"]["path"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"{path} does not say what data the run read ({error!r}). Give it with --data.") from error
    if not data.is_dir():
        raise DataError(
            f"the run's dataset {data} (data.path in {path}) is not here. Run this where it is, or give it with --data."
        )
    return data
