"""The gradients of an optimiser step, wherever the strategy keeps them: their global norm, scaling, and removal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Gradients(Protocol):
    """What the training module does with gradients, after the last backward of an optimiser step."""

    def norm(self) -> Tensor:
        """Return the L2 norm over all parameters, each counted once, as a float64 scalar; a collective."""

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar."""

    def drop(self) -> None:
        """Forget the gradients, so that the optimiser's next step changes neither weights nor its own state."""


class ParameterGradients:
    """Gradients in ``parameter.grad``: one process, DDP, FSDP2 and tensor parallelism."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.grad is not None]

    def norm(self) -> Tensor:
        """Add up the squares of local parts over the mesh dimensions that split them, which differ by parameter."""
        parts: dict[tuple[Any, ...], list[Tensor]] = {(): []}
        for parameter in self.parameters:
            grad = parameter.grad
            groups: tuple[Any, ...] = ()
            if isinstance(grad, DTensor):
                split = [dim for dim, placement in enumerate(grad.placements) if not placement.is_replicate()]
                groups = tuple(grad.device_mesh.get_group(dim) for dim in split)
            parts.setdefault(groups, []).append(_local(grad))
        device = self.parameters[0].device
        return sum((_sum_of_squares(p, groups, device) for groups, p in parts.items()), start=_zero(device)).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiply in place."""
        torch._foreach_mul_([_local(p.grad) for p in self.parameters], factor.float())

    def drop(self) -> None:
        """Set every gradient to None: an optimiser passes such parameters over."""
        for parameter in self.parameters:
            parameter.grad = None


class ZeroGradients:
    """Gradients in the partitions of DeepSpeed's ZeRO-2 and ZeRO-3, each rank holding a part."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer  # DeepSpeedZeroOptimizer or DeepSpeedZeroOptimizer_Stage3
        self.parts: list[Tensor] = [part for group in optimizer.averaged_gradients.values() for part in group or ()]

    def norm(self) -> Tensor:
        """Add up the squares over ranks."""
        groups = (self.optimizer.dp_process_group,)
        return _sum_of_squares(self.parts, groups, torch.device(self.optimizer.device)).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Let the optimiser divide by the inverse when it has cast its part to float32."""
        self._let_zero2_look(False)
        self.optimizer.override_loss_scale(1.0 / factor.item())

    def drop(self) -> None:
        """Make them NaN, on which both optimisers clear their buffers and leave the step out."""
        self._let_zero2_look(True)
        for part in self.parts:
            part.fill_(float("nan"))

    def _let_zero2_look(self, look: bool) -> None:
        """Say whether ZeRO-2 looks at each gradient, with a dozen kernels each. ZeRO-3 takes their norm always."""
        if hasattr(self.optimizer, "check_grad_overflow"):
            self.optimizer.check_grad_overflow = look


def _local(grad: Any) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)


def _sum_of_squares(tensors: Sequence[Tensor], groups: Sequence[Any], device: torch.device) -> Tensor:
    """Sum over tensors and process groups; float32 inside a tensor, float64 between them."""
    total = _zero(device)
    if tensors:
        total = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).double().square().sum()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total
