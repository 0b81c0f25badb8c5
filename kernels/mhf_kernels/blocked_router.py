"""The gate in PyTorch, beside the `reference` backend. May import torch and its siblings."""

from __future__ import annotations

from torch import Tensor

from mhf_kernels.reference import router_weights, router_weights_backward


def forward(q: Tensor, router: Tensor) -> Tensor:
    """Return R, as `router_weights`."""
    return router_weights(q, router)


def backward(grad_r: Tensor, q: Tensor, router: Tensor, dq: Tensor | None) -> Tensor:
    """Add to `dq`, where it is given, and return the gradient of `router`, contiguous and in its dtype."""
    through_r, d_router = router_weights_backward(grad_r, q, router)
    if dq is not None:
        dq.add_(through_r)
    return d_router.to(router.dtype).contiguous()
