"""A few numbers of every rank, exchanged on the CPU: no wait for the device. Imports torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RankTable:
    """A process group of all ranks on CPUs. Making one, and each use, is a collective of all ranks."""

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if distributed else None

    def gather(self, values: Sequence[float]) -> Tensor:
        """Return the values of all ranks, ``[ranks, len(values)]``, float64."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine, group=self._group)
        return torch.stack(rows)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks of a tensor on the CPU."""
        total = values.clone()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total
