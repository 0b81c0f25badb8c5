"""Picks the device kernels of the ops: the one place that does. May import torch and, lazily, the backends.

A backend is anything with the members of `Backend`; a module will do. To add one: write the module, and add its line to
`BACKENDS`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """Kernels for the forward and the backward of the op. Inputs are checked already; strides are arbitrary.

    A backend may also have `routed_forward(q, k, u, v, router)`, which returns o, or None where it cannot.
    """

    name: str

    def supports(self, q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None) -> str | None:
        """Return None where these inputs can run here, else the reason why not; without r, one of a `Gate`."""

    def forward(self, q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
        """Return o `[B, L, H, d_h]`, contiguous, in the dtype of `q`."""

    def backward(
        self,
        grad_o: Tensor,
        q: Tensor,
        k: Tensor,
        u: Tensor,
        v: Tensor,
        r: Tensor,
        needs_grad: tuple[bool, bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of q, k, u, v, r in their dtypes; None where `needs_grad` is False.

        dQ, dK, dU and dV are contiguous; dR is laid out as `torch.empty_like(r)`.
        """


class Gate(Protocol):
    """Kernels for R, between the router's weight and a backend. Inputs are checked already; strides are arbitrary."""

    def forward(self, q: Tensor, router: Tensor) -> Tensor:
        """Return R `[B, L, H, E]` of `router_weights`, in memory `[H, E, B, L]`."""

    def backward(self, grad_r: Tensor, q: Tensor, router: Tensor, dq: Tensor | None) -> Tensor:
        """Add to `dq`, where it is given, what R hands back to Q, and return the gradient of `router` in its dtype."""


class BackendUnavailableError(ValueError):
    """`MHF_BACKEND` names a backend that does not exist, or that cannot run these inputs."""


# Name to module, in the order in which `auto` tries them. The last one supports everything.
BACKENDS = {
    "gluon": "mhf_kernels.gluon_backend",
    "triton": "mhf_kernels.triton_backend",
    "reference": "mhf_kernels.blocked",
}
NAMES = tuple(BACKENDS)
GATE_KERNELS = "mhf_kernels.triton_router"  # for both kinds of kernels
PLAIN_GATE = "mhf_kernels.blocked_router"


def select(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None) -> Backend:
    """Return the backend for these inputs, as the environment variable `MHF_BACKEND` says (default `auto`).

    Raises:
        BackendUnavailableError: the named backend is unknown, or does not support the inputs.
    """
    wanted = os.environ.get("MHF_BACKEND") or "auto"
    if wanted == "auto":
        return _load(next(name for name in BACKENDS if why_not(name, q, k, u, v, r) is None))

    if wanted not in NAMES:
        raise BackendUnavailableError(f"MHF_BACKEND={wanted} is unknown; allowed: auto, {', '.join(NAMES)}")
    reason = why_not(wanted, q, k, u, v, r)
    if reason is not None:
        others = ", ".join(name for name in BACKENDS if name != wanted)
        raise BackendUnavailableError(
            f"MHF_BACKEND={wanted} is not available here: {reason}; unset it, or set it to one of: auto, {others}"
        )
    return _load(wanted)


def select_router(q: Tensor, router: Tensor) -> Gate:
    """Return the gate for these inputs: kernels where they run, unless `MHF_BACKEND=reference`, else plain PyTorch."""
    if os.environ.get("MHF_BACKEND") != "reference":
        with contextlib.suppress(ImportError):
            kernels = importlib.import_module(GATE_KERNELS)
            if kernels.supports(q, router):
                return kernels
    return importlib.import_module(PLAIN_GATE)


def routed_forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, router: Tensor) -> Tensor:
    """Return O: with the gate inside the kernel where the backend for these inputs does that, else from R in memory."""
    backend = select(q, k, u, v, None)
    routed = getattr(backend, "routed_forward", None)
    o = None if routed is None else routed(q, k, u, v, router)
    return backend.forward(q, k, u, v, select_router(q, router).forward(q, router)) if o is None else o


def why_not(name: str, q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None) -> str | None:
    """Return None where the backend can run these inputs, else the reason why not."""
    try:
        backend = _load(name)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return backend.supports(q, k, u, v, r)


def _load(name: str) -> Backend:
    return importlib.import_module(BACKENDS[name])
