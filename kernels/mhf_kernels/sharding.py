"""How DTensor may split the ops over a mesh. May import torch; imports torch.distributed only where that exists.

Per mesh dimension an op runs split in one of four ways, without communication of its own; with the router's weight in
place of R in the first three, since the gate sums over sub-networks:

- replicate: every rank computes everything.
- tokens: Q, R, dO split along B or L, weights replicated; dK, dU, dV are partial sums.
- heads: Q, R, dO split along H, weights along H_kuv, so that a query head stays with its K/U/V head.
- sub-networks: weights and R split along E; O and dQ are partial sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

    PlacementRow = tuple[list[Placement | None], list[Placement | None]]

Way = tuple[tuple["int | None", ...], "int | None"]
WaysOf = Callable[[Any, Any], list[Way]]

# The dimension along which each of (q, k, u, v, r) is split, and that of the output o; None: not split.
_TOKENS_B: Way = ((0, None, None, None, 0), 0)
_TOKENS_L: Way = ((1, None, None, None, 1), 1)
_HEADS: Way = ((2, 0, 0, 0, 2), 2)
_SUBNETWORKS: Way = ((None, 1, 1, 1, 3), None)

# The same for (q, k, u, v, router).
_ROUTED_TOKENS_B: Way = ((0, None, None, None, None), 0)
_ROUTED_TOKENS_L: Way = ((1, None, None, None, None), 1)
_ROUTED_HEADS: Way = ((2, 0, 0, 0, 0), 2)

_FIRST_BOOL = 6  # of a backward: grad_o, q, k, u, v, r or router, then need_q ... need_r


def register() -> None:
    """Register the ways for both ops and their backwards; nothing without torch.distributed."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.mhf
    register_sharding(ops.flash_mhf.default)(partial(_forward_ways, _ways))
    register_sharding(ops.flash_mhf_routed.default)(partial(_forward_ways, _routed_ways))
    propagator = DTensor._op_dispatcher.sharding_propagator
    for backward, ways in ((ops.flash_mhf_backward, _ways), (ops.flash_mhf_routed_backward, _routed_ways)):
        register_sharding(backward.default)(partial(_backward_ways, ways))
        # register_sharding leaves booleans out of the key under which DTensor caches a decision. Here they change the
        # shapes of the outputs, so all arguments from the first boolean on must count.
        propagator.op_to_schema_info[backward.default] = RuntimeSchemaInfo(_FIRST_BOOL, needs_pytree=True)


def _forward_ways(ways: WaysOf, q: Any, k: Any, u: Any, v: Any, gate: Any) -> Sequence[PlacementRow]:
    """Return (placements of [o], placements of [q, k, u, v, r or router]) for each way."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    rows: list[PlacementRow] = [([Replicate()], [Replicate()] * 5)]
    for inputs, output in ways(q, k):
        placed: list[Any] = [Replicate() if dim is None else Shard(dim) for dim in inputs]
        rows.append(([Partial() if output is None else Shard(output)], placed))
    return rows


def _backward_ways(
    ways: WaysOf, grad_o: Any, q: Any, k: Any, u: Any, v: Any, gate: Any, *needed: bool
) -> Sequence[PlacementRow]:
    """Return (placements of the 5 gradients, placements of [grad_o, q, k, u, v, r or router, 5 booleans]) for each way.

    Where an input is not split, its gradient is a partial sum. A gradient that is not needed is an empty tensor, the
    same on every rank.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    rows: list[PlacementRow] = [([Replicate()] * 5, [Replicate()] * 6 + [None] * 5)]
    for inputs, output in ways(q, k):
        grads: list[Any] = [
            Replicate() if not need else Partial() if dim is None else Shard(dim)
            for dim, need in zip(inputs, needed, strict=True)
        ]
        placed: list[Any] = [Replicate() if dim is None else Shard(dim) for dim in (output, *inputs)]
        rows.append((grads, placed + [None] * 5))
    return rows


def _ways(q: Any, k: Any) -> list[Way]:
    return [_TOKENS_B, _TOKENS_L, _SUBNETWORKS, *([_HEADS] if _heads_can_be_split(q, k) else [])]


def _routed_ways(q: Any, k: Any) -> list[Way]:
    return [_ROUTED_TOKENS_B, _ROUTED_TOKENS_L, *([_ROUTED_HEADS] if _heads_can_be_split(q, k) else [])]


def _heads_can_be_split(q: Any, k: Any) -> bool:
    heads, kuv_heads = q.shape[2], k.shape[0]
    return heads == kuv_heads or _splits_evenly(kuv_heads, q.mesh.shape)


def _splits_evenly(size: int, mesh_shape: Sequence[int]) -> bool:
    """Return whether every product of mesh dimensions up to `size` divides it.

    Larger products are refused by DTensor itself. An uneven split would part query heads from their K/U/V head.
    """
    dims = range(1, len(mesh_shape) + 1)
    products = {math.prod(chosen) for n in dims for chosen in itertools.combinations(mesh_shape, n)}
    return all(size % product == 0 for product in products if product <= size)
