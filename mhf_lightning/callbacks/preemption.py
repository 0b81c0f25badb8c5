"""Leaving on request: all ranks save between the same two optimiser steps, and exit with a code that says why."""

import time
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from mhf_lightning.callbacks.checkpoint import StepCheckpoint
from mhf_lightning.signals import Interrupt, stop_requested

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: "try again"; slurm/pretrain.sbatch answers it with a requeue
EXIT_INTERRUPTED = 130  # what shells make of SIGINT: a user who is there stopped it, and nobody is to start it again
LEAVING = frozenset((EXIT_PREEMPTED, EXIT_INTERRUPTED))  # saved, to be resumed

_INTERRUPTED, _STOPPED = 1, 2  # what a rank was asked to do; of several requests the largest counts
_ANSWER = "\nCtrl-C: saving after this step, or after the validation that runs; press it again to leave at once\n"


def drop_sigterm_broadcast(trainer: Trainer) -> None:
    """Keep Lightning from broadcasting its SIGTERM flag, with a wait for the device, before every micro-batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


class Preemption(Checkpoint):
    """Saves and leaves when any rank was sent a stop signal, or its first SIGINT (:mod:`mhf_lightning.signals`).

    Ranks agree by a MAX reduction on a CPU group, begun after every second optimiser step and looked at after the one
    that follows, so that nobody waits for it. A fixed number of steps, because an interval chosen by the pace so far
    would be too long for a rank that becomes slow: SLURM may leave 30 s. The save is on disk before the process leaves.
    Validation that is due after this step is left to the next start, which begins with it; a request during validation
    is seen one step after it.

    SIGINT is one of the requests from the first step's end, before which there is nothing to lose, until the last step
    is saved; at other times it ends the run at once.

    It is a ``Checkpoint`` because Lightning keeps those last: behind :class:`ExactResume`, which counts the samples.
    """

    def __init__(self, checkpoint: StepCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._group: Any = None
        self._stop = torch.tensor(0)  # what any rank was asked; kept, because making one takes half the time
        self._interrupt = Interrupt()
        self._code = EXIT_PREEMPTED
        self._steps = 0  # done in this start
        self._asked = False  # whether to look at the reduction
        self._work: Any = None
        self._leaving = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the group, take Lightning's own flag out of the way, and leave at once if that is asked for already."""
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        drop_sigterm_broadcast(trainer)
        self._ask()
        self._answer(trainer)
        if self._leaving:
            self._leave(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """After an optimiser step: ask, or hear the answer, and save if this run is to leave."""
        if trainer.fit_loop._should_accumulate():
            return
        self._steps += 1
        if self._steps == 1:
            self._interrupt.catch(_ANSWER if trainer.is_global_zero else "")
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
        """Hear the last answer: a process that ends within a reduction aborts. All is saved by now."""
        self._wait()
        self._interrupt.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on, after all that others print."""
        self._interrupt.release()
        if isinstance(exception, SystemExit) and exception.code == EXIT_INTERRUPTED:
            rank_zero_info("to continue, give the same command with --ckpt_path auto")

    def _ask(self) -> None:
        if stop_requested():
            self._stop.fill_(_STOPPED)
        elif self._interrupt.requested:
            self._stop.fill_(_INTERRUPTED)
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
            self._code = EXIT_INTERRUPTED if self._stop == _INTERRUPTED else EXIT_PREEMPTED
            begun = time.monotonic()
            self.checkpoint.save(trainer)
            trainer.strategy.wait_for_save()  # type: ignore[attr-defined]
            saved = f"step {step} is saved ({time.monotonic() - begun:.1f} s)" if step else "before the first step"
            rank_zero_info(f"asked to stop: {saved}; leaving with exit code {self._code}")

    def _leave(self, trainer: Trainer) -> NoReturn:
        for logger in trainer.loggers:
            logger.finalize("preempted")
        # Lightning kills this process when one that it started has ended with another code than 0: that is due now.
        getattr(trainer.strategy.launcher, "procs", []).clear()
        if self._group is not None:
            dist.barrier(self._group)  # no rank ends, and has the others killed, before all curves are written
        raise SystemExit(self._code)
