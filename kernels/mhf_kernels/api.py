"""The public entry to the op: checks the inputs, then calls it. May import torch and the op."""

from __future__ import annotations

import torch
from torch import Tensor

from mhf_kernels.ops import flash_mhf_op

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def flash_mhf(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Compute `S_h = sum_e R_e * ((SiLU(Q_h K_e^T) * (Q_h U_e^T)) V_e)` for every head (step 4 of the layer).

    No tensor of `[tokens, heads, d_ff]` is held, neither here nor for the backward, which recomputes. Tensors are
    read by their strides. Under autocast q, k, u, v are cast to its dtype and r to float32.

    Args:
        q: queries, `[B, L, H, d_h]`; bfloat16, float16, float32 or float64.
        k: gate weights, `[H_kuv, E, d_e, d_h]`; H_kuv divides H, query head h uses K/U/V head `h // (H / H_kuv)`.
        u: up weights, the shape of `k`.
        v: down weights, the shape of `k`.
        r: gates, `[B, L, H, E]`; float32 or the dtype of `q`.

    Returns:
        `[B, L, H, d_h]`, contiguous, in the dtype of `q`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check_shapes(q, k, u, v, r)
    _check_dtypes(q, k, u, v, r)
    devices = {x.device for x in (q, k, u, v, r)}
    if len(devices) > 1:
        raise ValueError(f"flash_mhf: tensors are on {', '.join(map(str, devices))}; move them to one device")
    return flash_mhf_op(q, k, u, v, r)


def _check_shapes(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, u {tuple(u.shape)}, v {tuple(v.shape)}, r {tuple(r.shape)}"
    if any(x.dim() != 4 for x in (q, k, u, v, r)):
        raise ValueError(
            f"flash_mhf: {shapes}; q is [B, L, H, d_h], k, u, v are [H_kuv, E, d_e, d_h], r is [B, L, H, E]"
        )
    if k.shape != u.shape or k.shape != v.shape:
        raise ValueError(f"flash_mhf: {shapes}; k, u and v must have one shape, [H_kuv, E, d_e, d_h]")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"flash_mhf: {shapes}; q and k must have the same d_h, their last dimension")
    if q.shape[2] % k.shape[0]:
        raise ValueError(f"flash_mhf: {shapes}; H_kuv = {k.shape[0]} must divide H = {q.shape[2]}")
    if r.shape[:3] != q.shape[:3] or r.shape[3] != k.shape[1]:
        raise ValueError(f"flash_mhf: {shapes}; r must be [B, L, H, E] with B, L, H of q and E of k")


def _check_dtypes(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> None:
    if torch.is_autocast_enabled(q.device.type):
        return  # the op casts
    if any(x.dtype != q.dtype for x in (k, u, v)) or q.dtype not in DTYPES or r.dtype not in (q.dtype, torch.float32):
        given = f"q {q.dtype}, k {k.dtype}, u {u.dtype}, v {v.dtype}, r {r.dtype}"
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"flash_mhf: {given}; q, k, u, v share one of {allowed}, and r has that dtype or float32")
