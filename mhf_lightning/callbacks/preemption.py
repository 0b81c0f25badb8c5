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


class Preemption(Checkpoint):
    """Saves and leaves when any rank was sent a stop signal (:mod:`mhf_lightning.signals`).

    Ranks agree by a MAX reduction on a CPU group, begun after every second optimiser step and looked at after the one
    that follows, so that nobody waits for it. A fixed number of steps, because an interval chosen by the pace so far
    would be too long for a rank that becomes slow: SLURM may leave 30 s. The save is on disk before the process leaves.
    Validation that is due after this step is left to the next start, which begins with it; a request during validation
    is seen one step after it.

    It is a ``Checkpoint`` because Lightning keeps those last: behind :class:`ExactResume`, which counts the samples.
    """

    def __init__(self, checkpoint: StepCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._group: Any = None
        self._stop = torch.tensor(0)  # whether any rank was asked; kept, because making one takes half the time
        self._asked = False  # whether to look at the reduction
        self._work: Any = None
        self._leaving = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the group, take Lightning's own flag out of the way, and leave at once if that is asked for already."""
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        # Lightning broadcasts its SIGTERM flag, with a synchronisation of the device, before every micro-batch.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        self._ask()
        self._answer(trainer)
        if self._leaving:
            self._leave(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """After an optimiser step: ask, or hear the answer, and save if this run is to leave."""
        if trainer.fit_loop._should_accumulate():
            return
        if self._asked:
            self._answer(trainer)
        else:
            self._ask()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave: the last step is logged, and the next start validates."""
        if self._leaving:
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask anew: validation takes long."""
        if not trainer.sanity_checking:
            self._wait()
            self._ask()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Leave, now that Lightning has logged the last step."""
        if self._leaving:
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear the last answer: a process that ends within a reduction aborts."""
        self._wait()

    def _ask(self) -> None:
        if stop_requested():
            self._stop.fill_(1)
        if self._group is not None:
            self._work = dist.all_reduce(self._stop, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = True

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _answer(self, trainer: Trainer) -> None:
        self._wait()
        self._asked = False
        step = trainer.global_step
        if self._stop and step < trainer.max_steps:
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
