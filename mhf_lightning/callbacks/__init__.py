"""Callbacks, one file each."""

from typing import Any

from lightning.pytorch import Trainer


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether this micro-batch ended an optimiser step at which Lightning writes to its loggers."""
    settings: Any = trainer  # Lightning sets log_every_n_steps without declaring it
    ended_a_step = not settings.fit_loop._should_accumulate()
    return ended_a_step and trainer.global_step % settings.log_every_n_steps == 0
