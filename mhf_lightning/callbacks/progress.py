"""Progress in optimiser steps: a bar of one line in a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from mhf_lightning.callbacks import is_logging_step
from mhf_lightning.callbacks.deferred import Deferring
from mhf_lightning.output import say

MEASURED = ("throughput/", "memory/")


def progress_bar() -> ProgressBar:
    """Return a bar where someone looks at the output, else plain lines."""
    return StepProgressBar() if sys.stdout.isatty() else ProgressLines()


def status(metrics: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what is known of loss, perplexities, speed and memory, in this order; waits for the device."""
    formats = {
        "train/loss": ("loss", "{:.3f}"),
        "train/perplexity": ("ppl", "{:,.1f}"),
        "val/perplexity": ("val ppl", "{:,.1f}"),
        "throughput/tokens_per_s": ("tok/s", "{:,.0f}"),
        "memory/peak_gib": ("mem", "{:.1f}G"),
    }
    return {name: form.format(float(metrics[tag])) for tag, (name, form) in formats.items() if tag in metrics}


def measured(trainer: Trainer) -> dict[str, str]:
    """Return speed and memory, which other callbacks have measured and deferred; they are on the CPU."""
    return status({key: value for key, value in trainer.callback_metrics.items() if key.startswith(MEASURED)})


class StepProgressBar(Deferring, TQDMProgressBar):
    """Lightning's bar, counting optimiser steps; a resume does not disturb the time that it says is left.

    Values change at the steps at which Lightning logs, when those of other callbacks are known: a turn later.
    """

    BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the line shows."""
        return dict(status(trainer.callback_metrics))

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin at the step that training continues from."""
        super().on_train_start()
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = trainer.global_step
        bar.set_description("step")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Leave the line as it is."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move on after an optimiser step."""
        bar = self.train_progress_bar
        if bar.disable or trainer.fit_loop._should_accumulate():
            return
        if is_logging_step(trainer):
            values = self.get_metrics(trainer, pl_module)
            self.defer(lambda: bar.set_postfix(values | measured(trainer), refresh=False))
        bar.update(trainer.global_step - bar.n)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the line as it is."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line, before others print why the run ends."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def init_validation_tqdm(self) -> Tqdm:
        """Return a hidden bar during training, which would be a second line."""
        if self.trainer.state.fn == "fit":
            self.train_progress_bar.set_description("validating")
            return Tqdm(disable=True)
        return super().init_validation_tqdm()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the perplexity that was found."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit":
            self.train_progress_bar.set_description("step")


class ProgressLines(Deferring, ProgressBar):
    """Prints a line for each step at which Lightning logs, a turn later, and one after each validation."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._begun = 0, 0.0  # step and time at which this start had done its first step

    def disable(self) -> None:
        """Print nothing, as Lightning asks of all ranks but one."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock with the first step, which compiles."""
        self._begun = 0, 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave a line where Lightning logs."""
        if not self._enabled or trainer.fit_loop._should_accumulate():
            return
        step, now = trainer.global_step, time.monotonic()
        if not self._begun[0]:
            self._begun = step, now
        if is_logging_step(trainer):
            values, left = status(trainer.callback_metrics), {}
            if step > self._begun[0]:
                seconds = (now - self._begun[1]) / (step - self._begun[0]) * (trainer.max_steps - step)
                left = {"left": str(timedelta(seconds=round(seconds)))}
            self.defer(lambda: self._print(trainer, step, values, left))

    def _print(self, trainer: Trainer, step: int, values: dict[str, str], left: dict[str, str]) -> None:
        words = _words(values | measured(trainer) | left)
        say(f"step {step:,}/{trainer.max_steps:,}", *words, sep="  ")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what validation found."""
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            loss, perplexity = (float(trainer.callback_metrics[f"val/{key}"]) for key in ("loss", "perplexity"))
            say(f"step {trainer.global_step:,}: validation loss {loss:.4f}, perplexity {perplexity:,.2f}")


def _words(values: dict[str, str]) -> list[str]:
    return [f"{name} {value}" for name, value in values.items()]
