"""A list of runs, worked off in pieces: each call takes what fits into its time, one process a GPU.

The list is a CSV file that is committed with the configurations beside it. A run that was stopped goes on from its
checkpoint when a later call finds its folder, else it begins again.
"""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mhf_lightning.bench.measure import commit
from mhf_lightning.callbacks.preemption import LEAVING
from mhf_lightning.data.manifest import MANIFEST, Manifest

NOTICE_SECONDS = 20.0  # from the request to stop until a process is killed: two steps and a save
START_SECONDS = 60.0  # to start and to compile: with less time left nothing would come of a run
LONGER = 1.25  # a run that was cut is taken to need so many times what it had then
UNKNOWN_SHARE = 0.9  # of a call's time, for a run of a size of which none is done
MAX_FAILURES = 3  # in a call; what fails that often fails for all
TO_DO = ("", "cut")
STATES = (*TO_DO, "done", "failed")
PACK = "events.tar.gz"


@dataclass
class Row:
    """A run of the list.

    Attributes:
        size: Folder of configurations beside the list.
        variant: Model file of that folder.
        lr: Peak learning rate, as it is written on the command line.
        seed: Of the weights; the order of data is the same in all runs.
        state: Empty (to be run), ``cut`` (begun, to be continued), ``done`` or ``failed``.
        seconds: Time that its processes took.
    """

    size: str
    variant: str
    lr: str
    seed: str
    state: str
    seconds: str

    @property
    def name(self) -> str:
        """Folder of the run, below that of all runs."""
        return f"{self.size}/{self.variant}/lr{self.lr}-seed{self.seed}"


def read_queue(path: Path) -> list[Row]:
    """Read the list.

    Raises:
        ValueError: It does not exist, has other columns or values, or names a run twice.
    """
    columns = [field.name for field in fields(Row)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restkey="more", restval="")
            if reader.fieldnames != columns:
                raise ValueError(f"{path} has the columns {reader.fieldnames}; they must be {', '.join(columns)}")
            lines = list(reader)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; give the list of runs with --queue") from error
    for line in lines:
        if len(line) > len(columns) or line["state"] not in STATES or not (line["seconds"] or "0").isdigit():
            what = f"{', '.join(columns)}; state {', '.join(STATES[1:])} or empty, seconds a whole number or empty"
            raise ValueError(f"{path}: {', '.join(map(str, line.values()))} is no line of {what}")
    rows = [Row(**line) for line in lines]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} lists {', '.join(twice)} more than once")
    return rows


def write_queue(rows: list[Row], path: Path) -> None:
    """Write the list; a reader finds the old or the new one, never a part."""
    written = path.with_name(f".{path.name}.writing")
    with written.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    written.replace(path)


def expected_seconds(row: Row, rows: list[Row], unknown: float) -> float:
    """Return what a whole run took at most, of the same variant and size, else of the same size.

    Args:
        row: The run; it needs more than it had where it was cut.
        rows: The list.
        unknown: The answer where no run of the size is done.
    """
    done = [other for other in rows if other.state == "done" and other.size == row.size and other.seconds]
    same = [other for other in done if other.variant == row.variant]
    return max(LONGER * float(row.seconds or 0), max((float(other.seconds) for other in same or done), default=unknown))


class Runner:
    """Works off a list."""

    def __init__(self, queue: Path, data: Path, runs: Path, out: Path, devices: list[str]) -> None:
        """Read what there is.

        Args:
            queue: The list, with the folders of configurations beside it.
            data: The dataset.
            runs: Folder of the run folders.
            out: Where the list and the event files of this call's runs go, after every run.
            devices: What ``CUDA_VISIBLE_DEVICES`` is for each process; an empty one leaves it alone.

        Raises:
            ValueError: List, dataset or commit are missing.
        """
        self.queue, self.data, self.runs, self.out, self.devices = queue, data, runs, out, devices
        self.rows = read_queue(queue)
        if not (data / MANIFEST).exists():
            raise ValueError(f"there is no corpus at {data}; make it with: mhf evidence corpus --data {data}")
        code = commit()
        if code is None:
            raise ValueError("the commit of this code is not known: it is no git checkout; set MHF_COMMIT")
        self.variables = {"MHF_COMMIT": code, "MHF_DATASET": Manifest.load(data).dataset_id[:12]}
        self.touched: list[Row] = []

    def command(self, row: Row) -> list[str]:
        """Return the arguments of ``mhf`` for a run."""
        folder = self.queue.parent / row.size
        command = ["fit", "--config", f"{folder}/recipe.yaml", "--config", f"{folder}/{row.variant}.yaml"]
        command += ["--run_dir", f"{self.runs}/{row.name}", "--data.path", f"{self.data}"]
        command += ["--model.optimizer.lr", row.lr, "--seed_everything", row.seed, "--ckpt_path", "auto"]
        return command

    def work(self, seconds: float, whole: bool = False) -> bool:
        """Start runs in the order of the list, and have those that are left near the end save and leave.

        Args:
            seconds: Time until all processes have ended.
            whole: Begin only runs that should end before that.

        Returns:
            Whether none failed.
        """
        running: dict[int, _Process] = {}
        try:
            return self._work(seconds, whole, running)
        finally:  # an error here must not leave processes behind: they save and leave
            for process in running.values():
                process.popen.terminate()

    def _work(self, seconds: float, whole: bool, running: dict[int, _Process]) -> bool:
        begun = time.monotonic()
        stop_at, kill_at = begun + seconds - NOTICE_SECONDS, begun + seconds
        unknown = UNKNOWN_SHARE * (stop_at - begun) if whole else None
        failures = 0
        asked = False
        while True:
            now = time.monotonic()
            for slot, process in list(running.items()):
                if (code := process.popen.poll()) is not None:
                    del running[slot]
                    failures += self._ended(process, code)
            if now < stop_at and failures < MAX_FAILURES:
                for slot in range(len(self.devices)):
                    if slot not in running and (row := self._next(running.values(), stop_at - now, unknown)):
                        running[slot] = self._start(row, self.devices[slot])
            if not running:
                print(f"runs that are left: {sum(row.state in TO_DO for row in self.rows)}", flush=True)
                return failures == 0
            if now >= stop_at and not asked:
                asked = True
                for process in running.values():
                    process.popen.send_signal(signal.SIGUSR1)
            if now >= kill_at:
                for process in running.values():
                    process.popen.kill()
            time.sleep(0.2)

    def _next(self, running: Iterable[_Process], left: float, unknown: float | None) -> Row | None:
        """Return the first run that may begin; with ``unknown`` seconds given, one that should end in what is left."""
        busy = [process.row for process in running]
        for row in self.rows:
            if row in busy or row.state not in TO_DO:
                continue
            going_on = self._goes_on(row)
            if row in self.touched and not going_on:
                continue  # it was cut before its first checkpoint in this call
            needed = START_SECONDS if unknown is None or going_on else expected_seconds(row, self.rows, unknown)
            if needed <= left:
                return row
        return None

    def _goes_on(self, row: Row) -> bool:
        return row.state == "cut" and (self.runs / row.name / "checkpoints").exists()

    def _start(self, row: Row, device: str) -> _Process:
        folder = self.runs / row.name
        if not self._goes_on(row):
            row.seconds = ""  # also where it was cut on another machine: it begins again
        folder.mkdir(parents=True, exist_ok=True)
        command = self.command(row)
        variables = {**os.environ, **self.variables, "MHF_COMMAND": shlex.join(["mhf", *command])}
        if device:
            variables["CUDA_VISIBLE_DEVICES"] = device
        with (folder / "log.txt").open("a") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", "mhf_lightning.cli", *command], env=variables, stdout=log, stderr=log
            )
        print(f"{row.name}: started", flush=True)
        self.touched.append(row)
        return _Process(row, popen, time.monotonic())

    def _ended(self, process: _Process, code: int) -> int:
        """Write down how a run ended; returns 1 where it failed."""
        row, took = process.row, time.monotonic() - process.begun
        killed = -code in (signal.SIGKILL, signal.SIGUSR1)  # before it could save
        row.state = "done" if code == 0 else "cut" if killed or code in LEAVING else "failed"
        row.seconds = f"{float(row.seconds or 0) + took:.0f}"
        print(f"{row.name}: {row.state} after {took:.0f} s", flush=True)
        if row.state == "failed":
            lines = (self.runs / row.name / "log.txt").read_text(errors="replace").splitlines()
            print(f"{row.name}: exit code {code}\n  " + "\n  ".join(lines[-30:]), flush=True)
        write_queue(self.rows, self.queue)
        self.out.mkdir(parents=True, exist_ok=True)
        write_queue(self.rows, self.out / self.queue.name)
        pack(self.runs, [touched.name for touched in self.touched], self.out / PACK)
        return int(row.state == "failed")


@dataclass
class _Process:
    row: Row
    popen: subprocess.Popen[Any]
    begun: float


def pack(runs: Path, names: list[str], path: Path) -> None:
    """Put the event files of runs into one archive, under the names of the runs; host names are left out."""
    written = path.with_name(f".{path.name}.writing")
    with tarfile.open(written, "w:gz") as archive:
        for name in dict.fromkeys(names):
            for number, file in enumerate(sorted((runs / name / "tensorboard").glob("*tfevents*"))):
                archive.add(file, f"{name}/tensorboard/{number:02}.tfevents")
    written.replace(path)
