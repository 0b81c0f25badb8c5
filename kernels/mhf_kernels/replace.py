"""FlashMHF in the place of the feed-forward layers of a model that exists. Imports torch and its siblings only."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from mhf_kernels.initialization import InitGains
from mhf_kernels.layer import FlashMHF

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def replace_ffn(model: nn.Module, *, d_h: int, d_e: int, num_subnetworks: int | None = None, **options: Any) -> None:
    """Replace every SwiGLU feed-forward layer of a Hugging Face Llama, Qwen, Mistral or the like by a new `FlashMHF`.

    A layer counts as one if it holds the linear layers `gate_proj`, `up_proj` and `down_proj`. Device and dtype stay;
    the new weights are random, so this is for a model that is to be pretrained. A Hugging Face model keeps the settings
    in `model.config.flash_mhf`, with which the same layers are built again: `replace_ffn(model,
    **model.config.flash_mhf)`.

    Args:
        model: changed in place.
        d_h: width of a head; must divide the model's width.
        d_e: width of a sub-network.
        num_subnetworks: E; None takes the number that comes nearest to the parameters of the layer that goes.
        options: further arguments of `FlashMHF`; `gains` may be a dictionary, as the settings hold it.

    Raises:
        ValueError: no such layer, or sizes that do not fit.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if all(isinstance(getattr(child, projection, None), nn.Linear) for projection in PROJECTIONS)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward layer with {', '.join(PROJECTIONS)}; replace its layers by "
            "mhf_kernels.FlashMHF yourself"
        )
    if isinstance(options.get("gains"), dict):
        options["gains"] = InitGains(**options["gains"])
    settings: dict[str, Any] = {"d_h": d_h, "d_e": d_e, **options}
    if options.get("gains") is not None:
        settings["gains"] = asdict(options["gains"])  # the configuration becomes JSON
    for parent, name, old in found:
        down = old.down_proj
        assert isinstance(down, nn.Linear)
        d_model = down.out_features
        if d_h < 1 or d_model % d_h != 0:
            raise ValueError(f"d_h must divide the model's width, {d_model}; got {d_h}")
        layer = partial(FlashMHF, d_model, d_model // d_h, d_e=d_e, **options)
        if num_subnetworks is None:  # all layers of these models are alike
            one, two = (_count(layer(num_subnetworks=e, device="meta")) for e in (1, 2))
            num_subnetworks = max(1, 1 + round((_count(old) - one) / (two - one)))
        new = layer(num_subnetworks=num_subnetworks, device=down.weight.device, dtype=down.weight.dtype)
        setattr(parent, name, new.train(old.training))
    if hasattr(model, "config"):
        config: Any = model.config
        config.flash_mhf = {**settings, "num_subnetworks": num_subnetworks}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
