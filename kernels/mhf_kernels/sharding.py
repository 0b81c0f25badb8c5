"""How DTensor may split the op over a mesh. May import torch; imports torch.distributed only where that exists.

Per mesh dimension the op runs split in one of four ways, without communication of its own:

- replicate: every rank computes everything.
- tokens: Q, R, dO split along B or L, weights replicated; dK, dU, dV are partial sums.
- heads: Q, R, dO split along H, weights along H_kuv, so that a query head stays with its K/U/V head.
- sub-networks: weights and R split along E; O and dQ are partial sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

    PlacementRow = tuple[list[Placement | None], list[Placement | None]]

Way = tuple[tuple["int | None", ...], "int | None"]

# The dimension along which each of (q, k, u, v, r) is split, and that of the output o; None: not split.
_TOKENS_B: Way = ((0, None, None, None, 0), 0)
_TOKENS_L: Way = ((1, None, None, None, 1), 1)
_HEADS: Way = ((2, 0, 0, 0, 2), 2)
_SUBNETWORKS: Way = ((None, 1, 1, 1, 3), None)

_FIRST_BOOL = 6  # of flash_mhf_backward: grad_o, q, k, u, v, r, then need_q ... need_r


def register() -> None:
    """Register the ways for `mhf::flash_mhf` and `mhf::flash_mhf_backward`; nothing without torch.distributed."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    backward = torch.ops.mhf.flash_mhf_backward.default
    register_sharding(torch.ops.mhf.flash_mhf.default)(_forward_ways)
    register_sharding(backward)(_backward_ways)
    # register_sharding leaves booleans out of the key under which DTensor caches a decision. Here they change the
    # shapes of the outputs, so all arguments from the first boolean on must count.
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[backward] = RuntimeSchemaInfo(_FIRST_BOOL, needs_pytree=True)


def _forward_ways(q: Any, k: Any, u: Any, v: Any, r: Any) -> Sequence[PlacementRow]:
    """Return (placements of [o], placements of [q, k, u, v, r]) for each way."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    rows: list[PlacementRow] = [([Replicate()], [Replicate()] * 5)]
    for inputs, output in _ways(q, k):
        placed: list[Any] = [Replicate() if dim is None else Shard(dim) for dim in inputs]
        rows.append(([Partial() if output is None else Shard(output)], placed))
    return rows


def _backward_ways(grad_o: Any, q: Any, k: Any, u: Any, v: Any, r: Any, *needed: bool) -> Sequence[PlacementRow]:
    """Return (placements of [dq, dk, du, dv, dr], placements of [grad_o, q, k, u, v, r, 5 booleans]) for each way.

    Where an input is not split, its gradient is a partial sum. A gradient that is not needed is an empty tensor, the
    same on every rank.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    rows: list[PlacementRow] = [([Replicate()] * 5, [Replicate()] * 6 + [None] * 5)]
    for inputs, output in _ways(q, k):
        grads: list[Any] = [
            Replicate() if not need else Partial() if dim is None else Shard(dim)
            for dim, need in zip(inputs, needed, strict=True)
        ]
        placed: list[Any] = [Replicate() if dim is None else Shard(dim) for dim in (output, *inputs)]
        rows.append((grads, placed + [None] * 5))
    return rows


def _ways(q: Any, k: Any) -> list[Way]:
    ways = [_TOKENS_B, _TOKENS_L, _SUBNETWORKS]
    heads, kuv_heads = q.shape[2], k.shape[0]
    if heads == kuv_heads or _splits_evenly(kuv_heads, q.mesh.shape):
        ways.append(_HEADS)
    return ways


def _splits_evenly(size: int, mesh_shape: Sequence[int]) -> bool:
    """Return whether every product of mesh dimensions up to `size` divides it.

    Larger products are refused by DTensor itself. An uneven split would part query heads from their K/U/V head.
    """
    dims = range(1, len(mesh_shape) + 1)
    products = {math.prod(chosen) for n in dims for chosen in itertools.combinations(mesh_shape, n)}
    return all(size % product == 0 for product in products if product <= size)
