"""The named initialisations of the FlashMHF layer: which standard deviation each weight starts with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

BASE_STD = 0.02
LINEAR_GAIN = 0.707


@dataclass(frozen=True)
class InitGains:
    """Overrides of single values of an initialisation scheme; None keeps the scheme's value.

    Attributes:
        linear_gain: gain of the Xavier-uniform initialisation of W_in and W_out.
        k_std: standard deviation of K.
        u_std: standard deviation of U.
        v_std: standard deviation of V.
        router_std: standard deviation of the router.
    """

    linear_gain: float | None = None
    k_std: float | None = None
    u_std: float | None = None
    v_std: float | None = None
    router_std: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"gains.{field.name} must be a finite number >= 0 or None; got {value}")


@dataclass(frozen=True)
class InitScales:
    """What `FlashMHF.reset_parameters` draws from: Xavier gain and standard deviations."""

    linear_gain: float
    k_std: float
    u_std: float
    v_std: float
    router_std: float
    truncate_router: bool


@dataclass(frozen=True)
class LayerSizes:
    """What a scheme may depend on."""

    d_model: int
    d_h: int
    num_subnetworks: int
    query_norm: bool
    has_linear: bool


def paper(sizes: LayerSizes, linear_gain: float) -> InitScales:
    """Return the values of the authors' released code: everything 0.02, the router from a truncated normal."""
    return InitScales(linear_gain, BASE_STD, BASE_STD, BASE_STD, BASE_STD, truncate_router=True)


def variance_matched(sizes: LayerSizes, linear_gain: float) -> InitScales:
    """Return values with which the layer starts at the scale of a SwiGLU FFN whose weights have std 0.02.

    A SwiGLU's pre-activations are sums over d_model terms, here over d_h: hence `sqrt(d_model / d_h)` on K and U. R
    starts near 1/E: hence `E` on V. Without query norm, Q has the scale that W_in gives it, `linear_gain` times that
    of its input, instead of 1: K and U make up for it. W_out's gain stays, so the output has about 0.7 times the
    scale of the SwiGLU's.
    """
    ku_std = BASE_STD * math.sqrt(sizes.d_model / sizes.d_h)
    if sizes.has_linear and not sizes.query_norm and linear_gain > 0:
        ku_std /= linear_gain
    v_std = BASE_STD * sizes.num_subnetworks
    return InitScales(linear_gain, ku_std, ku_std, v_std, BASE_STD, truncate_router=False)


SCHEMES: dict[str, Callable[[LayerSizes, float], InitScales]] = {
    "paper": paper,
    "variance_matched": variance_matched,
}


def initial_scales(scheme: str, sizes: LayerSizes, gains: InitGains | None = None) -> InitScales:
    """Return the values of a named scheme, with the overrides of `gains`.

    Raises:
        ValueError: no scheme has this name.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown initialization {scheme!r}; allowed: {', '.join(SCHEMES)}")
    gains = gains or InitGains()
    scales = SCHEMES[scheme](sizes, LINEAR_GAIN if gains.linear_gain is None else gains.linear_gain)
    return replace(scales, **{name: value for name, value in vars(gains).items() if value is not None})
