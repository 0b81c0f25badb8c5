"""Checkpoints by steps: the newest few, ``last.ckpt``, and one at the end of the run."""

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep.

    Attributes:
        every_n_steps: Optimiser steps between two checkpoints.
        keep: How many of the newest to keep, besides last.ckpt.
    """

    every_n_steps: int = 500
    keep: int = 1

    def __post_init__(self) -> None:
        if self.every_n_steps <= 0 or self.keep <= 0:
            raise ValueError(
                f"checkpoint: every_n_steps is {self.every_n_steps}, keep is {self.keep}; both must be positive"
            )


class StepCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback, driven by steps, that also saves the last step of a run."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        super().__init__(
            dirpath=folder,
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=config.keep,
            save_last=True,
            enable_version_counter=False,  # last.ckpt is always the newest, also in a run folder that was moved
            every_n_train_steps=config.every_n_steps,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the resumed step as saved: Lightning would save it again in the middle of an accumulation window."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final step unless that was just done."""
        if trainer.global_step > self._last_global_step_saved:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
