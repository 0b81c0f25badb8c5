"""The named initialisations of the layer: which scale each weight is drawn with. May import nothing of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEMES = ("paper", "variance_matched")
BASE_STD = 0.02  # of a SwiGLU layer's matrices, and of K, U, V in the released weights
LINEAR_GAIN = 0.707


@dataclass(frozen=True)
class InitGains:
    """Scales of a layer's initial weights; as an override, None keeps the scheme's value.

    `linear_gain` is the Xavier-uniform gain of W_in and W_out, the others are standard deviations.
    """

    linear_gain: float | None = None
    k_std: float | None = None
    u_std: float | None = None
    v_std: float | None = None
    router_std: float | None = None


@dataclass(frozen=True)
class Scales:
    """The scales a layer is drawn with."""

    linear_gain: float
    k_std: float
    u_std: float
    v_std: float
    router_std: float


def scales(
    scheme: str, *, d_model: int, d_h: int, num_subnetworks: int, unit_queries: bool, gains: InitGains | None = None
) -> Scales:
    """Return the scales of a named scheme, with overrides.

    `paper` has the released values. `variance_matched` starts the layer at the scale of a SwiGLU FFN of std 0.02:
    K and U are scaled so that pre-activations of d_h terms have the variance of d_model terms, V makes up for gates
    that average 1 / E.

    Args:
        scheme: `paper` or `variance_matched`.
        d_model: width of the model.
        d_h: width of a head.
        num_subnetworks: E.
        unit_queries: whether Q starts at unit variance; else at the gain of W_in (0.707), which K and U make up for.
        gains: overrides.

    Raises:
        ValueError: the scheme is unknown.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"initialization is {scheme!r}; it must be one of {', '.join(SCHEMES)}")
    given = gains or InitGains()
    linear_gain = LINEAR_GAIN if given.linear_gain is None else given.linear_gain
    ku_std = v_std = BASE_STD
    if scheme == "variance_matched":
        ku_std *= math.sqrt(d_model / d_h) / (1.0 if unit_queries else linear_gain)
        v_std *= num_subnetworks
    return Scales(
        linear_gain=linear_gain,
        k_std=ku_std if given.k_std is None else given.k_std,
        u_std=ku_std if given.u_std is None else given.u_std,
        v_std=v_std if given.v_std is None else given.v_std,
        router_std=BASE_STD if given.router_std is None else given.router_std,
    )
