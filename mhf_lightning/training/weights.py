"""Whether weights fit a model: its architecture, and the tokens that they were trained on. Knows no trainer."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mhf_lightning.checkpoint.files import TensorFile
from mhf_lightning.data.manifest import TOKENIZER
from mhf_lightning.data.tokenizer import have_same_tokens
from mhf_lightning.model import Decoder, DecoderConfig


def warn_of_other_tokens(weights: Path, tokenizer: Path) -> None:
    """Warn where the tokenizer of the data is not the one beside the weights, where `mhf import` puts it."""
    own = weights.parent / TOKENIZER
    if own.exists() and tokenizer.exists() and not have_same_tokens(own, tokenizer):
        rank_zero_warn(
            f"the data are of another tokenizer than the weights: {tokenizer} is not {own}; "
            "give that to mhf data prepare --tokenizer"
        )


def load_weights(decoder: Decoder, path: Path) -> None:
    """Fill a decoder from a safetensors file with its names; weights are cast to the decoder's dtype.

    Raises:
        ValueError: The file is missing or damaged, or of another architecture.
    """
    file = TensorFile(path)
    stored = {name: file.read(name) for name in file.names()}
    try:
        check_architecture(decoder.state_dict(), stored)
    except ValueError as error:
        raise ValueError(f"model.init_from, {path}: {error}") from error
    decoder.load_state_dict(stored)


def check_config(own: DecoderConfig, stored: dict[str, Any]) -> None:
    """Compare what changes a model's function without changing the shape of a weight.

    Raises:
        ValueError: A value differs; the message names it.
    """
    keys = ("num_attention_heads", "num_kv_heads", "rope_theta", "norm_eps", "tie_embeddings")
    ours = own.to_dict()
    differences = [f"{key}: model {ours[key]}, checkpoint {stored[key]}" for key in keys if ours[key] != stored[key]]
    if ours["ffn"]["name"] != stored["ffn"]["name"]:
        differences.append(f"ffn.name: model {ours['ffn']['name']}, checkpoint {stored['ffn']['name']}")
    gates = [ffn.get("gate") or "sigmoid" for ffn in (ours["ffn"], stored["ffn"])]
    if gates[0] != gates[1]:
        differences.append(f"ffn.gate: model {gates[0]}, checkpoint {gates[1]}")
    if differences:
        raise ValueError(
            f"the checkpoint holds another architecture: {'; '.join(differences)}; "
            f"use the model config that the run was started with (config.yaml in its run folder)"
        )


def check_architecture(own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Compare the keys and shapes of a model and a checkpoint.

    Raises:
        ValueError: They differ; the message names up to eight differences.
    """
    differences = [f"{key}: only in the model" for key in own.keys() - stored.keys()]
    differences += [f"{key}: only in the checkpoint" for key in stored.keys() - own.keys()]
    differences += [
        f"{key}: model {tuple(own[key].shape)}, checkpoint {tuple(stored[key].shape)}"
        for key in own.keys() & stored.keys()
        if own[key].shape != stored[key].shape
    ]
    if differences:
        shown = "\n  ".join(sorted(differences)[:8])
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(
            f"the checkpoint holds another architecture:\n  {shown}{more}\n"
            f"use the model config that the run was started with (config.yaml in its run folder)"
        )
