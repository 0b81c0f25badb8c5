"""AdamW with decay on matrices only, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn


@dataclass
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: Peak learning rate.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of matrices; norms are not decayed.
        grad_clip: Global gradient norm above which gradients are scaled down; 0 turns clipping off.
        router_lr_scale: Learning rate of the routers' weights over that of all else.
    """

    lr: float = 1.5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    router_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "router_lr_scale"):
            if getattr(self, key) <= 0:
                raise ValueError(f"optimizer.{key} is {getattr(self, key)}; it must be positive")
        for key in ("weight_decay", "grad_clip"):
            if getattr(self, key) < 0:
                raise ValueError(f"optimizer.{key} is {getattr(self, key)}; it must be 0 or more")


@dataclass
class ScheduleConfig:
    """Learning rate over the run, in optimiser steps.

    Attributes:
        name: ``cosine`` (warm-up, then half a cosine to the end) or ``wsd`` (warm-up, stable, linear decay).
        warmup_steps: Linear warm-up.
        decay_steps: Last steps that decay (wsd only).
        final_ratio: Learning rate at the end, as a share of the peak.
        total_steps: Length of the schedule; null means trainer.max_steps.
    """

    name: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    final_ratio: float = 0.01
    total_steps: Optional[int] = None  # noqa: UP045 - the CLI evaluates annotations, also on Python 3.10

    def length(self, max_steps: int) -> int:
        """Return the steps of the schedule in a run of ``max_steps``."""
        return self.total_steps or max_steps

    def factor(self, total_steps: int) -> Callable[[int], float]:
        """Return the share of the peak learning rate as a function of the steps done.

        Raises:
            ValueError: Warm-up and decay do not fit into the run, or the rate would become negative.
        """
        if self.final_ratio < 0:
            raise ValueError(f"schedule: final_ratio is {self.final_ratio}; a learning rate cannot be negative")
        total = self.length(total_steps)
        if self.warmup_steps < 0 or self.decay_steps < 0 or self.warmup_steps + self.decay_steps > total:
            raise ValueError(
                f"schedule: warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} do not fit into "
                f"{total} steps; shorten them or raise trainer.max_steps"
            )

        def at(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            if self.name == "cosine":
                done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
                return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))
            left = min(1.0, max(0, total - step) / max(1, self.decay_steps)) if self.decay_steps else 1.0
            return self.final_ratio + (1 - self.final_ratio) * left

        return at


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Split trainable parameters into decayed matrices and the rest (norm weights, whatever their shape).

    Routers, which are decayed too, are a third group where they have a learning rate of their own.

    Raises:
        ValueError: Routers are to have one, and there are none.
    """
    norms = {id(p) for m in model.modules() if "RMSNorm" in type(m).__name__ for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    routers: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in norms or parameter.ndim < 2:
            rest.append(parameter)
        elif config.router_lr_scale != 1.0 and name.split(".")[-1] == "router":
            routers.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if config.router_lr_scale != 1.0:
        if not routers:
            raise ValueError(
                "optimizer.router_lr_scale is for models with routers, and this one has none; leave it out"
            )
        lr = config.lr * config.router_lr_scale
        groups.append({"params": routers, "weight_decay": config.weight_decay, "lr": lr})
    return groups


class MeshAdamW(torch.optim.AdamW):
    """AdamW over DTensors of several device meshes, which fused kernels take one mesh at a time.

    ``param_groups`` stay as they were given, so that a checkpoint does not depend on the mesh.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, each group split by mesh."""
        groups = self.param_groups
        self.param_groups = [part for group in groups for part in _split_by_mesh(group)]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def _split_by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{**group, "params": parameters} for parameters in by_mesh.values()]


def leave_out_on_device(optimizer: torch.optim.Optimizer, left_out: Tensor) -> bool:
    """Let the device decide whether the next step is left out, and return True where the optimiser can: fused AdamW.

    Its kernels, the CPU's too, read ``found_inf``, which torch has for loss scaling: where that is 1, weights, moments
    and step counts stay as they are, whatever the gradients.

    Args:
        optimizer: Its next step is meant; this has to be called again for the one after it.
        left_out: A scalar on the parameters' device, 1 to leave the step out, else 0.
    """
    if not isinstance(optimizer, torch.optim.AdamW) or not all(group["fused"] for group in optimizer.param_groups):
        return False
    optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
    return True


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over ``model``, fused when all parameters are on a GPU."""
    on_gpu = all(p.is_cuda for p in model.parameters())
    meshes = {getattr(p, "device_mesh", None) for p in model.parameters()}
    return (MeshAdamW if len(meshes) > 1 else torch.optim.AdamW)(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if on_gpu else None,
    )
