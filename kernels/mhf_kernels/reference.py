"""The formula of the op as plain PyTorch: documentation, and the truth that tests compare with. Imports torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
