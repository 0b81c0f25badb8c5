"""Tokens per second of training, without validation and without the first, warming-up step."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mhf_lightning.callbacks import is_logging_step
from mhf_lightning.training.ranks import data_parallel_ranks


class Throughput(Callback):
    """Logs ``throughput/tokens_per_s`` over all ranks, between the steps at which Lightning logs.

    The device is synchronised only at those steps. ``tokens_per_s`` holds the average of the run so far.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._window_tokens = 0
        self._window_start: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Average over the measured part of the run; 0 before the first measurement."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count a micro-batch, and close the window where Lightning logs."""
        if self._window_start is None:  # the first batch pays for lazy initialisation and compilation
            self._window_start = self._now(pl_module)
            return
        self._window_tokens += batch["labels"].numel() * data_parallel_ranks(trainer)[1]
        if is_logging_step(trainer):
            rate = self._close(pl_module)
            if rate is not None:
                pl_module.log("throughput/tokens_per_s", rate, prog_bar=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if not trainer.sanity_checking and self._window_start is not None:
            self._close(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if not trainer.sanity_checking and self._window_start is not None:
            self._window_start = self._now(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the last, unfinished window."""
        if self._window_start is not None:
            self._close(pl_module)

    def _close(self, pl_module: LightningModule) -> float | None:
        assert self._window_start is not None
        now = self._now(pl_module)
        seconds, tokens = now - self._window_start, self._window_tokens
        self._window_start, self._window_tokens = now, 0
        self.seconds += seconds
        self.tokens += tokens
        return tokens / seconds if tokens else None

    @staticmethod
    def _now(pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()
