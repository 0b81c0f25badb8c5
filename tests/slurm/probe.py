"""A callback for the ranks of test jobs: says what they read, when, and takes its pace from a file."""

import json
import os
import time
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback

from mhf_lightning.callbacks.preemption import Preemption


class Probe(Callback):
    """Appends to ``samples-RANK``; sleeps in a step as ``pace`` or ``pace-RANK`` says, and in a save as ``save`` does.

    Rank 1 raises at the step in ``fail``.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.rank = os.environ["SLURM_PROCID"]
        self.file = (self.folder / f"samples-{self.rank}").open("a", buffering=1)

    def read(self, name: str, default: float) -> float:
        path = self.folder / name
        return float(path.read_text() or default) if path.exists() else default

    def on_train_start(self, trainer, pl_module):
        self.write(start=trainer.global_step)
        if "MHF_MEASURE" in os.environ:
            (preemption,) = (callback for callback in trainer.callbacks if isinstance(callback, Preemption))
            preemption.on_train_batch_end = self.measured(preemption.on_train_batch_end)

    def measured(self, hook):
        def call(*args, **kwargs):
            dist.barrier()  # else the next collective's wait for a slower rank is counted here
            begun = time.perf_counter()
            hook(*args, **kwargs)
            self.write(agreement=time.perf_counter() - begun)

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.read(f"pace-{self.rank}", self.read("pace", 0.0)))
        if trainer.global_step == self.read("fail", -1) and self.rank == "1":
            raise RuntimeError("as the test asked for")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step + trainer.fit_loop._should_accumulate()
        self.write(step=step, samples=batch["sample_index"].tolist())

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        time.sleep(self.read("save", 0.0))

    def write(self, **values) -> None:
        job, restart = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.file.write(json.dumps({"attempt": [job, restart], "time": time.time(), **values}) + "\n")
