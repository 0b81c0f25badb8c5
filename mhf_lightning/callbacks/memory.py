"""Peak memory: of the GPU where there is one, else of the process."""

import resource

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mhf_lightning.callbacks import is_logging_step

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak in GiB: allocated bytes of a CUDA device, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class PeakMemory(Callback):
    """Logs ``memory/peak_gib``, the largest over ranks since the run started."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log at the steps at which Lightning writes to its loggers."""
        if is_logging_step(trainer):
            pl_module.log("memory/peak_gib", peak_memory_gib(pl_module.device), reduce_fx="max", sync_dist=True)
