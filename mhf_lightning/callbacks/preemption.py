"""Leaving on request: all ranks save between the same two optimiser steps, and exit with a code of its own."""

import time
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from mhf_lightning.callbacks.checkpoint import StepCheckpoint
from mhf_lightning.signals import stop_requested

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: "try again"; slurm/pretrain.sbatch answers it with a requeue
SECONDS_BETWEEN_CHECKS = 2.0


class Preemption(Checkpoint):
    """Saves and leaves when any rank was sent a stop signal (:mod:`mhf_lightning.signals`).

    Ranks agree by a MAX reduction on a CPU group every few optimiser steps. How many is worked out from the duration
    of the slowest rank's steps, which the same reduction tells them, so all of them ask at the same step. The save is
    on disk before the process leaves; validation that is due after this step, and its point in the curves, still come
    before that.

    It is a ``Checkpoint`` because Lightning keeps those last: behind :class:`ExactResume`, which counts the samples.
    """

    def __init__(self, checkpoint: StepCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._group: Any = None
        self._leaving = False
        self._next_check = 0
        self._checked = 0, 0.0  # step and time of the last agreement

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the group, take Lightning's own flag out of the way, and leave at once if that is asked for already."""
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        # Lightning broadcasts its SIGTERM flag, with a synchronisation of the device, before every micro-batch.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        self._checked = trainer.global_step, time.monotonic()
        self._check(trainer)
        self._next_check = 0
        if self._leaving:
            self._leave(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """After an optimiser step, every few steps: agree, and save if this run is to leave."""
        due = max(self._next_check, self._checked[0] + 1)
        if trainer.global_step >= due and not trainer.fit_loop._should_accumulate():
            self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree right after the next step: validation takes long."""
        self._next_check = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Leave, now that Lightning has logged the last step."""
        if self._leaving:
            self._leave(trainer)

    def _check(self, trainer: Trainer) -> None:
        step, now = trainer.global_step, time.monotonic()
        seconds_per_step = (now - self._checked[1]) / max(1, step - self._checked[0])
        state = torch.tensor([float(stop_requested()), seconds_per_step], dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._group)
        self._checked = step, now
        self._next_check = step + max(1, int(SECONDS_BETWEEN_CHECKS / max(float(state[1]), 1e-6)))
        if state[0] > 0 and step < trainer.max_steps:
            self._leaving = True
            begun = time.monotonic()
            self.checkpoint.save(trainer)
            trainer.strategy.wait_for_save()  # type: ignore[attr-defined]
            rank_zero_info(
                f"asked to stop: step {step} is saved ({time.monotonic() - begun:.1f} s); leaving with exit code "
                f"{EXIT_PREEMPTED}"
            )

    def _leave(self, trainer: Trainer) -> NoReturn:
        for logger in trainer.loggers:
            logger.finalize("preempted")
        if self._group is not None:
            dist.barrier(self._group)  # no rank ends, and has the others killed, before all curves are written
        raise SystemExit(EXIT_PREEMPTED)
