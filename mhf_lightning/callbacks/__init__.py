"""Callbacks, one file each. What several of them need is here: when to log, and where the points go."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether this micro-batch ended an optimiser step at which Lightning writes to its loggers."""
    settings: Any = trainer  # Lightning sets log_every_n_steps without declaring it
    ended_a_step = not settings.fit_loop._should_accumulate()
    return ended_a_step and settings.log_every_n_steps > 0 and trainer.global_step % settings.log_every_n_steps == 0


def write_points(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Write to all loggers, at the step that Lightning gives ``train/loss`` (that of ``val/loss`` after validation).

    Lightning's own ``log`` would reduce each value by a collective of its own, and repeat stale ones.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=loop._batches_that_stepped)
