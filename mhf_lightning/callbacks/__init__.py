"""Callbacks, one file each."""

from typing import Any

from lightning.pytorch import Trainer


def log_interval(trainer: Trainer) -> int:
    """Return ``trainer.log_every_n_steps``, which Lightning sets without declaring it."""
    settings: Any = trainer
    return settings.log_every_n_steps
