"""Peak memory, of the GPU where there is one, else of the process; and what to do when there is not enough."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhf_lightning.callbacks import is_logging_step, point_step, write_points
from mhf_lightning.callbacks.deferred import Deferring
from mhf_lightning.callbacks.gathering import RankTable
from mhf_lightning.training.module import PretrainModule

GIB = 2**30
PHASES = ("forward", "backward", "optimizer", "validation", "other")

# The largest peaks that were reset away; the allocator's own counters are of the process, so are these.
_reset_peaks: dict[torch.device, int] = {}


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak since the process began in GiB: allocated bytes of a CUDA device, or the resident set."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(device), _reset_peaks.get(device, 0)) / GIB
    status = Path("/proc/self/status").read_text()
    # Not ru_maxrss, which survives exec: it would be that of the process that started this one.
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.M)[1]) * 1024 / GIB  # type: ignore[index]


def resident_gib() -> float:
    """Return the memory that this process holds now, without what is swapped out."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


class PeakMemory(Deferring):
    """Logs ``memory/*`` over the window since the last logging step; on a CPU the resident set only.

    Peaks are those of the allocator, whose counters are on the host: nothing waits for the device. Costs a read and a
    reset of the counters at four borders of a micro-batch, two of them while the device is busy. What a logging step
    adds, one exchange of a few numbers on the CPU and the points, is deferred.

    Where memory runs out, it writes a snapshot for https://pytorch.org/memory_viz and says what to change.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        """Set up the meter.

        Args:
            run_dir: Where the snapshot goes; None writes none.
        """
        super().__init__()
        self.run_dir = run_dir
        self._phase = "other"
        self._peaks = dict.fromkeys(PHASES, 0)
        self._reserved = 0
        self._ranks: RankTable | None = None

    def on_train_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Make the group of ranks."""
        self._ranks = RankTable()

    def on_train_batch_start(self, trainer: Trainer, pl_module: PretrainModule, *_: Any) -> None:  # type: ignore[override]
        """Begin the forward."""
        self._enter("forward", pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: PretrainModule, *_: Any) -> None:  # type: ignore[override]
        """Begin the backward."""
        self._enter("backward", pl_module.device)

    # Nothing is allocated between the end of the backward and the optimiser, or the micro-batch's end.

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: PretrainModule, *args: Any) -> None:  # type: ignore[override]
        """Begin the optimiser."""
        self._enter("optimizer", pl_module.device)
        super().on_before_optimizer_step(trainer, pl_module, *args)

    def on_validation_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Begin validation."""
        super().on_validation_start(trainer, pl_module)
        self._enter("validation", pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """End validation."""
        self._enter("other", pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: PretrainModule, *_: Any) -> None:  # type: ignore[override]
        """Close the window at the steps at which Lightning writes to its loggers."""
        counters = self._enter("other", pl_module.device)
        if is_logging_step(trainer):
            mine = self._take_window(pl_module.device, counters)
            self.defer(partial(self._write, trainer, mine, point_step(trainer)))

    def on_exception(self, trainer: Trainer, pl_module: PretrainModule, exception: BaseException) -> None:  # type: ignore[override]
        """Where memory ran out, write the snapshot and say what holds the memory and what to change."""
        super().on_exception(trainer, pl_module, exception)
        if not isinstance(exception, torch.OutOfMemoryError):
            return
        where = f"rank {trainer.global_rank}, {self._phase}"
        print(f"mhf: out of memory ({where}): {explain(trainer, pl_module)}", file=sys.stderr)
        if self.run_dir is not None and pl_module.device.type == "cuda":
            self.run_dir.mkdir(parents=True, exist_ok=True)
            path = self.run_dir / f"out-of-memory-rank-{trainer.global_rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            print(f"mhf: what the allocator holds: {path} (open it at https://pytorch.org/memory_viz)", file=sys.stderr)

    def _enter(self, phase: str, device: torch.device) -> dict[str, Any]:
        """Begin a phase; return the allocator's counters at the end of the one before, none on a CPU."""
        counters: dict[str, Any] = {}
        if device.type == "cuda":
            # torch.cuda.max_memory_allocated asks for the same counters, and sorts them.
            counters = torch.cuda.memory_stats_as_nested_dict(device)
            allocated = counters["allocated_bytes"]["all"]["peak"]
            self._peaks[self._phase] = max(self._peaks[self._phase], allocated)
            self._reserved = max(self._reserved, counters["reserved_bytes"]["all"]["peak"])
            _reset_peaks[device] = max(_reset_peaks.get(device, 0), allocated)
            torch.cuda.reset_peak_memory_stats(device)
        self._phase = phase
        return counters

    def _take_window(self, device: torch.device, counters: dict[str, Any]) -> dict[str, float]:
        """Return the window's values of this rank, and begin a new one."""
        mine = {"host": resident_gib()}
        if device.type == "cuda":
            mine["run"] = _reset_peaks[device] / GIB
            reserved = counters["reserved_bytes"]["all"]["current"]
            mine |= {phase: peak / GIB for phase, peak in self._peaks.items()}
            mine["peak"] = max(self._peaks.values()) / GIB
            mine["reserved"] = self._reserved / GIB
            mine["split"] = counters["inactive_split_bytes"]["all"]["current"] / max(reserved, 1)
            mine["retries"], mine["ooms"] = counters["num_alloc_retries"], counters["num_ooms"]
            self._peaks, self._reserved = dict.fromkeys(PHASES, 0), 0
        else:
            mine["run"] = mine["peak"] = peak_memory_gib(device)
        return mine

    def _write(self, trainer: Trainer, mine: dict[str, float], step: int) -> None:
        """Write the points of all ranks; a collective."""
        assert self._ranks is not None
        columns = dict(zip(mine, self._ranks.gather(list(mine.values())).T, strict=True))
        write_points(trainer, over_ranks(columns), step)


def over_ranks(columns: dict[str, Tensor]) -> dict[str, float]:
    """Turn the values of all ranks into points.

    Args:
        columns: ``[ranks]`` each: peak of the window and of the run, resident set, and on GPUs reserved, split (share
            of reserved bytes in parts of blocks that nobody uses), retries, ooms and the peak of each phase.
    """
    peak = columns["peak"]
    values = {
        "memory/peak_gib": columns["run"].max(),
        "memory/peak_min_gib": peak.min(),
        "memory/peak_mean_gib": peak.mean(),
        "memory/peak_max_gib": peak.max(),
        "memory/peak_rank": peak.argmax(),
        "memory/host_rss_gib": columns["host"].max(),
    }
    if "reserved" in columns:
        highest, reserved = int(peak.argmax()), columns["reserved"]
        values |= {
            "memory/peak_allocated_gib": peak[highest],
            "memory/peak_reserved_gib": reserved[highest],
            "memory/peak_reserved_min_gib": reserved.min(),
            "memory/peak_reserved_mean_gib": reserved.mean(),
            "memory/peak_reserved_max_gib": reserved.max(),
            "memory/fragmentation": columns["split"].max(),
            "memory/alloc_retries": columns["retries"].sum(),
            "memory/ooms": columns["ooms"].sum(),
        }
        values |= {f"memory/peak_in_{phase}_gib": columns[phase].max() for phase in PHASES if phase != "other"}
        if not values["memory/peak_in_validation_gib"]:  # there was none in this window
            del values["memory/peak_in_validation_gib"]
    return {key: float(value) for key, value in values.items()}


def explain(trainer: Trainer, pl_module: PretrainModule) -> str:
    """Say what holds this rank's memory, and name three settings to try."""
    parameters = list(pl_module.decoder.parameters())
    parts = {
        "weights": _gib(parameters),
        "gradients": _gib(p.grad for p in parameters),
        "optimiser state": _gib(x for o in trainer.optimizers for s in o.state.values() for x in s.values()),
    }
    if pl_module.device.type == "cuda":
        held = torch.cuda.memory_allocated(pl_module.device) / GIB
        parts["activations and the rest"] = max(0.0, held - sum(parts.values()))
    listed = ", ".join(f"{name} {size:.2f} GiB" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
    return f"{listed}. Try {'; or '.join(settings_to_try(trainer, pl_module))}; mhf plan shows what fits"


def settings_to_try(trainer: Trainer, pl_module: PretrainModule) -> list[str]:
    """Return three settings that lower the peak of this run, those that change the least first."""
    size = getattr(getattr(trainer, "datamodule", None), "micro_batch_size", 1)
    settings = []
    if size > 1:
        smaller = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        accumulate = trainer.accumulate_grad_batches * size // smaller
        settings.append(f"data.micro_batch_size {smaller} with trainer.accumulate_grad_batches {accumulate}")
    ffn = pl_module.decoder.config.ffn
    keeps_less = {"none": "selective", "selective": "ffn" if ffn.name == "flash_mhf" else "full", "ffn": "full"}
    if pl_module.activation_checkpointing in keeps_less:
        settings.append(f"model.activation_checkpointing {keeps_less[pl_module.activation_checkpointing]}")
    if ffn.name == "flash_mhf" and not ffn.recompute_queries:
        settings.append("model.decoder.ffn.recompute_queries true")
    settings += [
        "more GPUs with configs/trainer/fsdp2.yaml, which shards weights, gradients and optimiser state",
        "trainer.precision bf16-true",
        "data prepared with a smaller --context_length",
    ]
    return settings[:3]


def _gib(tensors: Iterable[Any]) -> float:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in local) / GIB
