"""What happens to a run, over all its starts: one JSON object a line in ``history.jsonl``; ``mhf runs`` reads it."""

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from mhf_lightning.callbacks.preemption import LEAVING
from mhf_lightning.checkpoint.strategy import CommittedCheckpoints
from mhf_lightning.model import ParameterCount, count_parameters
from mhf_lightning.runs import HISTORY, read_history
from mhf_lightning.training.module import PretrainModule

SECONDS_BETWEEN_PROGRESS = 30.0


class History(Callback):
    """Appends a line at each start, checkpoint, validation and end, and every 30 seconds; rank 0 writes.

    The lines and their fields are those of ``mhf_lightning/runs/read.py``. A line is one write to a file opened for
    appending, so a kill cuts the last line at most, and what follows a cut line begins a new one. Start, checkpoint
    and end are synced to disk. Progress asks for the loss, and so waits for the device, every 30 seconds. A file
    system that refuses a line is warned of, and training goes on.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / HISTORY
        self.restarts = 0
        self._file: int | None = None
        self._started = False
        self._parameters = ParameterCount(0, 0)
        self._last_progress = 0, -math.inf  # step and monotonic time
        self._saving: dict[int, dict[str, Any]] = {}  # what to write of a step when its checkpoint is committed

    def setup(self, trainer: Trainer, pl_module: PretrainModule, stage: str) -> None:  # type: ignore[override]
        """Count the parameters, before any are split over ranks; ask to be told of committed checkpoints."""
        self._parameters = count_parameters(pl_module.decoder)
        if isinstance(trainer.strategy, CommittedCheckpoints):
            trainer.strategy.on_commit = self._committed

    def on_fit_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Open the file."""
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def on_train_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Write the start (a collective: every rank tells its host)."""
        self._last_progress = trainer.global_step, -math.inf
        hosts: list[Any] = [socket.gethostname()]
        if dist.is_available() and dist.is_initialized():
            hosts = [None] * dist.get_world_size()
            dist.all_gather_object(hosts, socket.gethostname())
        if self._file is None:
            return
        self.restarts = sum(event["event"] == "start" for event in read_history(self.path)[0])
        self._started = True
        self._write(
            "start",
            trainer.global_step,
            tokens=pl_module.tokens_seen,
            process_start=process_start(),
            max_steps=trainer.max_steps,
            job_id=os.environ.get("SLURM_JOB_ID"),
            restart=self.restarts,
            world_size=trainer.world_size,
            hosts=sorted(set(hosts)),
            parameters=self._parameters._asdict(),
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: PretrainModule, *_: object) -> None:  # type: ignore[override]
        """Write progress, after the first step of this start and then when it is due."""
        step, written = self._last_progress
        if trainer.global_step > step and time.monotonic() - written >= SECONDS_BETWEEN_PROGRESS:
            self._progress(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Write the final progress."""
        if trainer.global_step > self._last_progress[0]:
            self._progress(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: PretrainModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Note when the step was done: Lightning asks for the callbacks' state before anything else."""
        self._saving[trainer.global_step] = {"tokens": pl_module.tokens_seen, "done": round(time.time(), 3)}

    def _committed(self, step: int) -> None:
        fields = self._saving.pop(step, None)
        if fields is not None:  # else a save of weights alone, from which no run continues
            self._write("checkpoint", step, **fields)

    def on_validation_end(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Write the validation's result."""
        if not trainer.sanity_checking:
            loss, perplexity = (trainer.callback_metrics.get(f"val/{key}") for key in ("loss", "perplexity"))
            self._write("validation", trainer.global_step, loss=loss, perplexity=perplexity)

    def teardown(self, trainer: Trainer, pl_module: PretrainModule, stage: str) -> None:  # type: ignore[override]
        """Write an end in good order; nothing is left to go wrong in Lightning."""
        if self._started:
            completed = trainer.global_step >= trainer.max_steps
            reason = "completed" if completed else "stopped"
            self._write("end", trainer.global_step, tokens=pl_module.tokens_seen, reason=reason)

    def on_exception(self, trainer: Trainer, pl_module: PretrainModule, exception: BaseException) -> None:  # type: ignore[override]
        """Write any other end; ``SystemExit``, by which preemption leaves, comes here too.

        A resume that is refused before it trains (a ValueError, exit code 2) leaves the run as it was.
        """
        if isinstance(exception, ValueError) and not self._started and self._file and os.fstat(self._file).st_size:
            return
        reason = "preempted"
        if not (isinstance(exception, SystemExit) and exception.code in LEAVING):
            first_line = str(exception).partition("\n")[0]
            reason = f"error: {type(exception).__name__}{': ' if first_line else ''}{first_line}"
        self._write("end", trainer.global_step, tokens=pl_module.tokens_seen, reason=reason)

    def _progress(self, trainer: Trainer, pl_module: PretrainModule) -> None:
        self._last_progress = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            step, tokens, metrics = trainer.global_step, pl_module.tokens_seen, trainer.callback_metrics
            loss, rate = metrics.get("train/loss"), metrics.get("throughput/tokens_per_s")
            self._write("progress", step, tokens=tokens, loss=loss, tokens_per_s=rate)

    def _write(self, event: str, step: int, **fields: Any) -> None:
        if self._file is None:
            return  # another rank, or a failure before the run took its folder
        line = {"event": event, "time": round(time.time(), 3), "step": step, **fields}
        try:
            append_line(self._file, {key: plain(value) for key, value in line.items()})
            if event in ("start", "checkpoint", "end"):
                os.fsync(self._file)
        except OSError as error:
            rank_zero_warn(f"{self.path}: {event} of step {step} is not written: {error.strerror}")


def append_line(file: int, line: dict[str, Any]) -> None:
    """Append a line to a file opened with O_RDWR and O_APPEND; the line of a process that was killed in it is ended."""
    data = json.dumps(line).encode() + b"\n"
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        data = b"\n" + data
    os.write(file, data)


def plain(value: Any) -> Any:
    """Return a metric's tensor as a float; what is not finite, which JSON does not know, as None."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def process_start() -> float:
    """Return the Unix time at which this process began, to a hundredth of a second (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return round(time.time() - age, 3)
