"""Signs of life for a watcher outside the process (slurm/watch.sh), and the Python stacks at its request."""

import faulthandler
import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only


class Heartbeat(Callback):
    """Each rank keeps ``rank-N`` in a folder: optimiser steps done, batches done by this process, Unix time.

    On SIGUSR2 the stacks of all threads are appended to ``stacks-rank-N.txt`` there. The handler is C code: it also
    runs while Python waits inside a collective. Both begin before the ranks look for each other, with the step that the
    run is to continue from.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rank = rank_zero_only.rank  # type: ignore[attr-defined]
        stacks = os.open(folder / f"stacks-rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        self._file = os.open(folder / f"rank-{rank}", os.O_WRONLY | os.O_CREAT, 0o644)
        self._batches = 0
        self._sent = 0.0
        self._beat(step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Beat."""
        self._beat(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Beat."""
        self._batches += 1
        self._beat(trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Beat, also before the first step: the steps done do not change."""
        self._batches += not trainer.sanity_checking
        self._beat(trainer.global_step)

    def _beat(self, step: int) -> None:
        now = time.time()
        os.pwrite(self._file, f"{step:<12} {self._batches:<12} {now:<18.3f}\n".encode(), 0)
        if now - self._sent >= 1.0:
            self._sent = now
            os.close(os.dup(self._file))  # any close makes a network file system send what was written
