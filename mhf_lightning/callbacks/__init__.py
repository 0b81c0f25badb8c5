"""Callbacks, one file each. What several of them need is here: options, when to log, and where the points go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from lightning.pytorch import Trainer


@dataclass
class MonitorConfig:
    """What is measured besides loss, speed and memory, which always are (at the steps of trainer.log_every_n_steps).

    Attributes:
        peak_tflops: Peak TFLOP/s of one device in dense bfloat16, for the MFU; null looks it up by the device's name.
        router_every_n_steps: Optimiser steps between two looks at FlashMHF's routers, taken at the next logging step;
            0 turns them off.
    """

    peak_tflops: Optional[float] = None  # noqa: UP045 - the CLI evaluates annotations, also on Python 3.10
    router_every_n_steps: int = 200

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"monitor.peak_tflops is {self.peak_tflops}; it must be positive")
        if self.router_every_n_steps < 0:
            raise ValueError(f"monitor.router_every_n_steps is {self.router_every_n_steps}; it must be 0 or more")


def is_logging_step(trainer: Trainer, ahead: int = 0) -> bool:
    """Return whether this micro-batch ended an optimiser step at which Lightning writes to its loggers.

    Args:
        trainer: It counts the optimiser steps.
        ahead: 1 before the optimiser's step, which is then not counted yet.
    """
    settings: Any = trainer  # Lightning sets log_every_n_steps without declaring it
    ends_a_step = not settings.fit_loop._should_accumulate()
    every = settings.log_every_n_steps
    return ends_a_step and every > 0 and (trainer.global_step + ahead) % every == 0


def point_step(trainer: Trainer) -> int:
    """Return the step that Lightning gives ``train/loss`` now (and ``val/loss`` after validation)."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop._batches_that_stepped


def write_points(trainer: Trainer, values: Mapping[str, float], step: int | None = None) -> None:
    """Write to all loggers, at a :func:`point_step`: by default that of now.

    Other callbacks find the values in ``trainer.callback_metrics``. Lightning's own ``log`` would reduce each value by
    a collective of its own, and repeat stale ones.
    """
    step = point_step(trainer) if step is None else step
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
