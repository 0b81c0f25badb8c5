"""The formulas of the ops as plain PyTorch: documentation, and the truth for tests. Imports torch only."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

# Asking torch.amp.is_autocast_available instead would break the graph under torch.compile in torch 2.11.
AUTOCAST_DEVICES = ("cpu", "cuda")
LEAST_SUM = 1e-20  # to which the authors' code clamps the sum of the sigmoids


def router_weights(q: Tensor, router: Tensor) -> Tensor:
    """Compute the gate `R = sigmoid(P) / sum_e sigmoid(P)`, `P = Q_h W^h`, step 3 of FlashMHF.

    Everything is float32, also under autocast (float64 for float64 inputs): Q and W^h are cast up before the product,
    which follows `torch.set_float32_matmul_precision` as every float32 product does. The sum is clamped to at least
    1e-20, as in the authors' code.

    Args:
        q: queries, `[B, L, H, d_h]`, any floating dtype.
        router: W, `[H, d_h, E]`, any floating dtype.

    Returns:
        `[B, L, H, E]`, float32, in memory `[H, E, B, L]`; each row sums to 1, unless it is clamped.
    """
    s = torch.sigmoid(_router_logits(q, router))
    return s / s.sum(dim=-1, keepdim=True).clamp_min(LEAST_SUM)


def softmax_weights(q: Tensor, router: Tensor) -> Tensor:
    """Compute `softmax(P)` in place of the gate, an ablation of it; shapes, dtypes and layout as `router_weights`."""
    return _router_logits(q, router).softmax(dim=-1)


def _router_logits(q: Tensor, router: Tensor) -> Tensor:
    """Return P `[B, L, H, E]`, in memory `[H, E, B, L]`: kernels read one sub-network's gates of many tokens."""
    wide = gate_dtype(q, router)
    with without_autocast(q.device.type):
        return torch.einsum("blhd,hde->hebl", q.to(wide), router.to(wide)).permute(2, 3, 0, 1)


def router_weights_backward(grad_r: Tensor, q: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `dP = R (1 - sigmoid(P)) (dR - sum_e R dR)`, and return `dQ = dP W^T` and `dW = Q^T dP`, both wide.

    Where the sum of the sigmoids is clamped it has no gradient, and the sum over e falls away.
    """
    wide = gate_dtype(q, router)
    with without_autocast(q.device.type):
        q, router, grad_r = q.to(wide), router.to(wide), grad_r.to(wide)
        s = torch.sigmoid(torch.einsum("blhd,hde->blhe", q, router))
        total = s.sum(-1, keepdim=True)
        r = s / total.clamp_min(LEAST_SUM)
        mean = (r * grad_r).sum(-1, keepdim=True) * (total >= LEAST_SUM)
        dp = r * (1 - s) * (grad_r - mean)
        return torch.einsum("blhe,hde->blhd", dp, router), torch.einsum("blhd,blhe->hde", q, dp)


def gate_dtype(q: Tensor, router: Tensor) -> torch.dtype:
    """Return the dtype in which the gate is computed."""
    return torch.promote_types(torch.promote_types(q.dtype, router.dtype), torch.float32)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast is off."""
    if device_type in AUTOCAST_DEVICES:  # not on the meta device
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def flash_mhf_reference(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Compute `S_h = sum_e R_e * ((SiLU(Q_h K_e^T) * (Q_h U_e^T)) V_e)` with every intermediate in memory.

    Step 4 of the FlashMHF layer (arXiv 2512.06989). Differentiable, any floating dtype; memory is
    `O(B L H d_ff)`, so use it for small shapes. Tests run it in float64.

    Args:
        q: queries, `[B, L, H, d_h]`.
        k: gate weights, `[H_kuv, E, d_e, d_h]`; query head `h` uses head `h // (H / H_kuv)`.
        u: up weights, the shape of `k`.
        v: down weights, the shape of `k`.
        r: gate of each sub-network, `[B, L, H, E]`, float32 or the dtype of `q`.

    Returns:
        `[B, L, H, d_h]` in the dtype of `q`.
    """
    queries_per_head = q.shape[2] // k.shape[0]
    k, u, v = (w.repeat_interleave(queries_per_head, dim=0) for w in (k, u, v))  # [H, E, d_e, d_h]
    m = torch.einsum("blhd,hefd->blhef", q, k)
    n = torch.einsum("blhd,hefd->blhef", q, u)
    s = torch.einsum("blhef,hefd->blhed", F.silu(m) * n, v)
    return (s * r.unsqueeze(-1).to(s.dtype)).sum(dim=3)
