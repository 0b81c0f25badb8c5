"""Rotary position embedding (theta 10,000 in the paper's models), computed from positions, without buffers."""

import torch
from torch import Tensor


def rotary_tables(position_ids: Tensor, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angles.

    Args:
        position_ids: ``[B, L]`` or ``[1, L]``, integer positions inside the document.
        d_head: Size of one attention head, even.
        theta: Base of the geometric series of wavelengths.

    Returns:
        Two float32 tensors ``[B, 1, L, d_head]``, the angles of the first half repeated in the second.
    """
    exponents = torch.arange(0, d_head, 2, device=position_ids.device, dtype=torch.float32) / d_head
    angles = position_ids.float()[:, None, :, None] * theta**-exponents  # [B, 1, L, d_head / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, heads, L, d_head]`` by the angles of its positions; the result has the dtype of ``x``."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)
