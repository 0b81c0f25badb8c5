"""Signs of life for a watcher outside the process, and the Python stacks of all threads at its request."""

import faulthandler
import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class Heartbeat(Callback):
    """Each rank writes ``rank-N`` (optimiser steps done, Unix time) into a folder, at most once a second.

    On SIGUSR2 the stacks of all threads are appended to ``stacks-rank-N.txt`` there. The handler is C code: it also
    runs while Python waits inside a collective.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "rank-0"
        self._beaten = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the first beat and install the handler."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / f"rank-{trainer.global_rank}"
        stacks = os.open(self.folder / f"stacks-rank-{trainer.global_rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        self._beat(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Beat."""
        self._beat(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Beat."""
        self._beat(trainer)

    def _beat(self, trainer: Trainer) -> None:
        now = time.time()
        if now - self._beaten >= 1.0:
            self._beaten = now
            new = self._path.with_suffix(".tmp")
            new.write_text(f"{trainer.global_step} {now:.3f}\n")
            new.replace(self._path)
