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

    Ranks agree by a MAX reduction on a CPU group every few optimiser steps, begun after one step and looked at after
    the next, so that nobody waits for it. How many steps is worked out from the duration of the slowest rank's steps,
    which the same reduction tells them, so all of them ask at the same step. The save is on disk before the process
    leaves. Validation that is due after this step is left to the next start, which begins with it; a request during
    validation is seen one step after it.

    It is a ``Checkpoint`` because Lightning keeps those last: behind :class:`ExactResume`, which counts the samples.
    """

    def __init__(self, checkpoint: StepCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None  # the reduction that is under way
        self._leaving = False
        self._next = 0  # step after which to ask
        self._last = 0, 0.0  # step and time of the last question

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the group, take Lightning's own flag out of the way, and leave at once if that is asked for already."""
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        # Lightning broadcasts its SIGTERM flag, with a synchronisation of the device, before every micro-batch.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        self._last = trainer.global_step, time.monotonic()
        self._ask(trainer)
        self._answer(trainer)
        self._next = 0  # steps have no duration yet
        if self._leaving:
            self._leave(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """After an optimiser step: ask, or hear the answer, and save if this run is to leave."""
        if trainer.fit_loop._should_accumulate():
            return
        if self._asked is not None:
            self._answer(trainer)
        elif trainer.global_step >= self._next:
            self._ask(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave: the last step is logged, and the next start validates."""
        if self._leaving:
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask: validation takes long."""
        if not trainer.sanity_checking and self._asked is None:
            self._ask(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Leave, now that Lightning has logged the last step."""
        if self._leaving:
            self._leave(trainer)

    def _ask(self, trainer: Trainer) -> None:
        step, now = trainer.global_step, time.monotonic()
        seconds_per_step = (now - self._last[1]) / max(1, step - self._last[0])
        self._last = step, now
        state = torch.tensor([float(stop_requested()), seconds_per_step], dtype=torch.float64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = state, work

    def _answer(self, trainer: Trainer) -> None:
        assert self._asked is not None
        (state, work), self._asked = self._asked, None
        if work is not None:
            work.wait()
        stop, seconds_per_step = state.tolist()
        step = trainer.global_step
        self._next = step + max(1, int(SECONDS_BETWEEN_CHECKS / max(seconds_per_step, 1e-6)))
        if stop and step < trainer.max_steps:
            self._leaving = True
            begun = time.monotonic()
            self.checkpoint.save(trainer)
            trainer.strategy.wait_for_save()  # type: ignore[attr-defined]
            saved = f"step {step} is saved ({time.monotonic() - begun:.1f} s)" if step else "before the first step"
            rank_zero_info(f"asked to stop: {saved}; leaving with exit code {EXIT_PREEMPTED}")

    def _leave(self, trainer: Trainer) -> NoReturn:
        for logger in trainer.loggers:
            logger.finalize("preempted")
        if self._group is not None:
            dist.barrier(self._group)  # no rank ends, and has the others killed, before all curves are written
        raise SystemExit(EXIT_PREEMPTED)
