"""When to save: every few steps, and at the end of the run. How is the strategy's part (mhf_lightning.checkpoint)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from mhf_lightning.checkpoint.folder import prepare_run
from mhf_lightning.checkpoint.shards import SaveOptions
from mhf_lightning.checkpoint.strategy import CommittedCheckpoints


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep.

    Attributes:
        every_n_steps: Optimiser steps between two checkpoints.
        keep: How many of the newest to keep; the one before the newest is what a run falls back on.
        keep_every_n_steps: Checkpoints of steps divisible by this are kept too, for good; null keeps none.
        background: Write while training goes on, from a copy in CPU memory; at most one save at a time.
    """

    every_n_steps: int = 500
    keep: int = 2
    keep_every_n_steps: Optional[int] = None  # noqa: UP045 - the CLI evaluates annotations, also on Python 3.10
    background: bool = True

    def __post_init__(self) -> None:
        for key in ("every_n_steps", "keep", "keep_every_n_steps"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"checkpoint.{key} is {value}; it must be positive")


class StepCheckpoint(Checkpoint):
    """Saves ``step-N`` folders, always between two optimiser steps."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self._saved = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that would write Lightning's own checkpoints.

        Raises:
            ValueError: The strategy is none of this package.
        """
        if not isinstance(trainer.strategy, CommittedCheckpoints):
            raise ValueError(
                f"the strategy is {type(trainer.strategy).__name__}, whose checkpoints do not survive a kill; use "
                "MHFSingleDevice of mhf_lightning.checkpoint.strategy, or one of mhf_lightning.training.strategies"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a killed run left, and set later steps' checkpoints aside; the resumed step may be saved here."""
        if trainer.is_global_zero:
            for path in prepare_run(self.folder, trainer.global_step):
                rank_zero_warn(f"{path} is of a later step than this run continues from; it was set aside")
        is_own = (self.folder / f"step-{trainer.global_step}").is_dir()  # and not that of another run
        self._saved = trainer.global_step if trainer.strategy.broadcast(is_own) else 0

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Save after an optimiser step whose number says so; the last one is saved when it has been validated."""
        step = trainer.global_step
        if trainer.fit_loop._should_accumulate():
            return  # the step of another run's checkpoint, and part of the next one
        if step > self._saved and step % self.config.every_n_steps == 0 and step != trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final step unless that was just done, and wait until everything is on disk."""
        if trainer.global_step > self._saved:
            self.save(trainer)
        assert isinstance(trainer.strategy, CommittedCheckpoints)
        trainer.strategy.wait_for_save()

    def save(self, trainer: Trainer) -> None:
        """Save now (a collective, right after an optimiser step); a step that is saved already is not saved again."""
        if trainer.global_step == self._saved:
            return
        config = self.config
        options = SaveOptions(config.background, config.keep, config.keep_every_n_steps)
        self._saved = trainer.global_step
        path = self.folder / f"step-{trainer.global_step}"
        trainer.save_checkpoint(path, weights_only=False, storage_options=options)
