"""FlashMHF in the place of the feed-forward layers of a model that exists. Imports torch and its siblings only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from mhf_kernels.initialization import InitGains
from mhf_kernels.layer import FlashMHF

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Of the parameters: how far off is warned of, and what a width has to keep to be named. Of four sub-networks or more,
# half of one is less than FAR.
FAR, NEAR = 0.1, 0.05


def replace_ffn(model: nn.Module, *, d_h: int, d_e: int, num_subnetworks: int | None = None, **options: Any) -> None:
    """Replace every SwiGLU feed-forward layer of a Hugging Face Llama, Qwen, Mistral or the like by a new `FlashMHF`.

    A layer counts as one if it holds the linear layers `gate_proj`, `up_proj` and `down_proj`; one that several parents
    share is replaced by one that they share. Device and dtype stay; the new weights are random, so this is for a model
    that is to be pretrained. A Hugging Face model keeps the settings in `model.config.flash_mhf`, with which the same
    layers are built again: `replace_ffn(model, **model.config.flash_mhf)`.

    Args:
        model: changed in place.
        d_h: width of a head; must divide the model's width.
        d_e: width of a sub-network.
        num_subnetworks: E; None takes the number that comes nearest to the parameters of the layer that goes. Where it
            comes no nearer than 10%, a warning names a smaller d_e.
        options: further arguments of `FlashMHF`, but `device` and `dtype`; `gains` may be a dictionary, as the settings
            hold it.

    Raises:
        ValueError: no such layer, a mixture of experts, layers of several sizes without `num_subnetworks`, or sizes
            that do not fit.
    """
    if options.keys() & {"device", "dtype"}:
        raise ValueError("device and dtype are those of the layers that go; move the model with .to() instead")
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
    layers = {child for _, _, child in found}
    mixtures = sorted(
        {type(m).__name__ for m in model.modules() if hasattr(m, "experts") and not layers.isdisjoint(m.modules())}
    )
    if mixtures:
        raise ValueError(
            f"{', '.join(mixtures)} is a mixture of experts, whose router counts on the layers that it has; replace "
            "whole mixtures by mhf_kernels.FlashMHF yourself"
        )
    counts = sorted(map(_count, layers))
    if num_subnetworks is None and counts[0] < counts[-1]:
        raise ValueError(f"the layers have from {counts[0]:,} to {counts[-1]:,} parameters; give num_subnetworks")
    if isinstance(options.get("gains"), dict):
        options["gains"] = InitGains(**options["gains"])
    settings: dict[str, Any] = {"d_h": d_h, "d_e": d_e, **options}
    if options.get("gains") is not None:
        settings["gains"] = asdict(options["gains"])  # the configuration becomes JSON
    replaced: dict[nn.Module, FlashMHF] = {}
    for parent, name, old in found:
        if old in replaced:
            setattr(parent, name, replaced[old])
            continue
        down = old.down_proj
        assert isinstance(down, nn.Linear)
        d_model = down.out_features
        if d_h < 1 or d_model % d_h != 0:
            raise ValueError(f"d_h must divide the model's width, {d_model}; got {d_h}")
        layer: Callable[..., FlashMHF] = partial(FlashMHF, d_model, d_model // d_h, **options)
        if num_subnetworks is None:
            num_subnetworks = _matched(layer, d_e, _count(old))
        new = layer(num_subnetworks, d_e, device=down.weight.device, dtype=down.weight.dtype)
        replaced[old] = new.train(old.training)
        setattr(parent, name, new)
    if hasattr(model, "config"):
        config: Any = model.config
        config.flash_mhf = {**settings, "num_subnetworks": num_subnetworks}


def _matched(layer: Callable[..., FlashMHF], d_e: int, wanted: int) -> int:
    """Return the number of sub-networks that comes nearest to a number of parameters; warn where that is not near."""
    one, two, wider = (_count(layer(e, width, device="meta")) for e, width in ((1, d_e), (2, d_e), (1, d_e + 1)))

    def nearest(width: int) -> tuple[int, float]:
        """E, and the share of parameters above what is wanted; `2 one - two` of them are not in sub-networks."""
        each = two - one + (width - d_e) * (wider - one)
        e = max(1, round((wanted - (2 * one - two)) / each))
        return e, (2 * one - two + e * each) / wanted - 1

    num_subnetworks, excess = nearest(d_e)
    if abs(excess) > FAR:
        widths = range(d_e // 16 * 16, 0, -16)  # of those that the kernels take, the widest
        near = next((width for width in widths if abs(nearest(width)[1]) <= NEAR), None)
        more = f"{abs(excess):.0%} {'more' if excess > 0 else 'fewer'}"
        warnings.warn(
            f"a FlashMHF layer with d_e {d_e} and E = {num_subnetworks} has {more} parameters than the layer that it "
            f"replaces; {'no smaller d_e' if near is None else f'd_e {near}'} matches to within {NEAR:.0%}",
            stacklevel=3,
        )
    return num_subnetworks


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
