"""Tokens per second, model FLOPs and where the time goes, without a wait for the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mhf_lightning.callbacks import is_logging_step, point_step, write_points
from mhf_lightning.callbacks.deferred import Deferring
from mhf_lightning.callbacks.gathering import RankTable
from mhf_lightning.callbacks.timeline import Border, Timeline
from mhf_lightning.plan.flops import flops_per_token
from mhf_lightning.plan.gpus import GPUS
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.ranks import is_first_of_replica

TRAINING = ("data", "forward", "backward", "optimizer", "logging", "other")
EXCLUDED = ("compile", "validation", "checkpoint")
PHASES = TRAINING + EXCLUDED

# What CUDA calls the devices, and their line in plan/gpus.py. A name that is not here has no MFU: its neighbours'
# peaks differ by factors (H20 and H200, A10 and A10G, the editions of one RTX PRO).
DEVICES = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA A10": "a10",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000",
}


class Throughput(Deferring):
    """Logs ``throughput/*`` and ``time/*`` over the window since the last logging step.

    Tokens are positions of the batches, summed over the ranks that read different data. The first optimiser step of a
    start, micro-batches in which a graph was compiled, validation and checkpoints count neither as time nor as tokens;
    ``time/*`` shows their share of the wall time. Totals over the run are in the checkpoint.

    Costs five CUDA events a micro-batch. What a logging step adds, one exchange of a few numbers on the CPU and the
    points, is deferred: host time while the device runs the next backward (on a CPU, a part of ``time/optimizer``).

    Attributes:
        tokens: Measured so far, over all ranks.
        samples: The same in sequences.
        seconds: The time they took, without what is excluded; the mean over ranks.
        peak_flops: FLOP/s of one device in dense bfloat16, or None where nobody knows.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        """Set up the meter.

        Args:
            peak_tflops: Peak TFLOP/s of one device for the MFU; None looks the device up by its name.
        """
        super().__init__()
        self.tokens = 0
        self.samples = 0
        self.seconds = 0.0
        self.peak_flops = None if peak_tflops is None else 1e12 * peak_tflops
        self._flops_per_token = 0.0
        self._timeline: Timeline | None = None
        self._ranks: RankTable | None = None
        self._window = torch.zeros(len(PHASES) + 2, dtype=torch.float64)  # seconds by phase, tokens, samples
        self._devices = 1
        self._warm = False
        self._graphs = 0

    @property
    def tokens_per_s(self) -> float:
        """Average over the measured part of the run, all starts; 0 before the first measurement."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Look up the device, and have the loop say when it fetches a batch: Lightning has no hook for that."""
        device = pl_module.device
        if self.peak_flops is None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            if name in DEVICES:
                self.peak_flops = GPUS[DEVICES[name]].bf16_flops
            else:
                rank_zero_info(f"MFU: n/a, the peak of {name!r} is not known; give --monitor.peak_tflops")
        self._timeline = Timeline(on_device=device.type == "cuda")
        self._ranks = RankTable()
        self._warm = False
        loop: Any = trainer.fit_loop.epoch_loop

        def before_fetch() -> None:
            self._enter("data")
            type(loop)._on_before_fetch(loop)  # begins what a profiler expects to end

        loop._on_before_fetch = before_fetch

    def on_train_batch_start(self, trainer: Trainer, pl_module: PretrainModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Begin the forward."""
        self._graphs = _compiled_graphs(pl_module)
        self._enter("forward")

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        """Begin the backward."""
        self._enter("backward")

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        """End the backward."""
        self._enter("other")

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        """Begin the optimiser: norm, clipping, update."""
        self._enter("optimizer")
        super().on_before_optimizer_step(trainer, *args)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: PretrainModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count a micro-batch; what comes until the next fetch, other callbacks above all, is logging."""
        assert self._timeline is not None
        labels = batch["labels"]
        if not self._flops_per_token:
            self._flops_per_token = flops_per_token(pl_module.decoder.config, labels.shape[1])
        end = self._timeline.enter("logging", labels.numel(), len(labels))
        if not self._warm:
            self._timeline.relabel("compile")
            self._warm = not trainer.fit_loop._should_accumulate()
        elif _compiled_graphs(pl_module) != self._graphs:
            self._timeline.relabel("compile", since="data")
        if is_logging_step(trainer):
            self.defer(partial(self._write, trainer, end, point_step(trainer), pl_module.tokens_seen))

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        """Write what is left, and stop the clock."""
        super().on_validation_start(trainer, *args)
        self._enter("validation")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock again."""
        self._enter("logging")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: PretrainModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Stop the clock, and store the totals up to here (a collective, after a wait for the device)."""
        if self._timeline is not None:
            self._read(trainer, self._timeline.enter("checkpoint"))
        checkpoint["throughput"] = {"tokens": self.tokens, "samples": self.samples, "seconds": self.seconds}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: PretrainModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Go on from the stored totals."""
        totals = checkpoint.get("throughput", {"tokens": 0, "samples": 0, "seconds": 0.0})
        self.tokens, self.samples, self.seconds = totals["tokens"], totals["samples"], totals["seconds"]

    def on_train_end(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Write what is left, and count the last, unfinished window."""
        super().on_train_end(trainer, pl_module)
        self._read(trainer)

    def _enter(self, phase: str) -> None:
        if self._timeline is not None:  # validation before training is not measured
            self._timeline.enter(phase)

    def _write(self, trainer: Trainer, end: Border, step: int, tokens_seen: int) -> None:
        """Close the window at the end of a logging step; a collective."""
        self._read(trainer, end)
        write_points(trainer, self._take_window(tokens_seen), step)

    def _read(self, trainer: Trainer, until: Border | None = None) -> None:
        """Add what came before a border to the window and to the totals; a collective."""
        assert self._timeline is not None
        assert self._ranks is not None
        by_phase, tokens, samples = self._timeline.read(until)
        counted = is_first_of_replica(trainer)
        row = [*(by_phase.get(phase, 0.0) for phase in PHASES), tokens * counted, samples * counted]
        table = self._ranks.gather(row)
        n = len(PHASES)
        passed = torch.cat((table[:, :n].mean(0), table[:, n:].sum(0)))
        self._window += passed
        self._devices = len(table)
        self.seconds += float(passed[: len(TRAINING)].sum())
        self.tokens += int(passed[n])
        self.samples += int(passed[n + 1])

    def _take_window(self, tokens_seen: int) -> dict[str, float]:
        """Return the window's points, and begin a new one."""
        *seconds, tokens, samples = self._window.tolist()
        self._window.zero_()
        wall, trained = sum(seconds), sum(seconds[: len(TRAINING)])
        values = {f"time/{phase}": s / wall for phase, s in zip(PHASES, seconds, strict=True)} if wall else {}
        values["throughput/flops"] = tokens_seen * self._flops_per_token
        if tokens and trained:
            rate = tokens / trained
            flops = rate / self._devices * self._flops_per_token
            values |= {
                "throughput/tokens_per_s": rate,
                "throughput/tokens_per_s_average": self.tokens_per_s,
                "throughput/tokens_per_s_per_gpu": rate / self._devices,
                "throughput/samples_per_s": samples / trained,
                "throughput/tflops_per_s": flops / 1e12,
            }
            if self.peak_flops is not None:
                values["throughput/mfu"] = flops / self.peak_flops
        return values


def _compiled_graphs(pl_module: PretrainModule) -> int:
    """Return how many graphs this process has compiled so far."""
    if not pl_module.compile_blocks:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
