"""Processes for cases: one for each rank, forked from a server that has imported everything.

A rank appends JSON lines to ``rankN.jsonl`` in the case's folder, so that what a killed one wrote is there; the last
line of a rank that is through is ``{"done": ...}``, of one that failed ``{"error": ...}``. Its output is ``rankN.log``.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from mhf_lightning.bench.measure import OutOfMemoryError, out_of_memory
from mhf_lightning.bench.scaling.cases import Case
from mhf_lightning.cores import usable_cores

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mhf_lightning.bench.scaling.rank"])  # which starts no CUDA; DeepSpeed would
GRACE = 3.0  # seconds for the other ranks to say what is wrong, and to end
POLL = 0.05
Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        status: ``ok``, ``OOM``, ``timeout after N s``, or ``failed: ...``.
        events: The lines of each rank.
        seconds: From the start of the processes to the end of the last.
        ended: When the end was seen, in seconds since the epoch.
        beside: Labels of the cases that ran meanwhile, on other GPUs or, where they share, on these.
        log: The end of what the rank that failed has printed.
    """

    status: str
    events: list[Events]
    seconds: float
    ended: float
    beside: tuple[str, ...] = ()
    log: str = ""

    def done(self) -> list[dict[str, Any]]:
        """Return what each rank said at its end."""
        return [event["done"] for events in self.events for event in events if "done" in event]


def start_server(slots: list[str], inductor_cache: Path) -> int:
    """Start the server that ranks are forked from; returns the CPU threads of each.

    Args:
        slots: As for `run_cases`.
        inductor_cache: Where ranks share what they compile, unless the environment names another folder.
    """
    threads = max(1, usable_cores() // len(slots))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(inductor_cache))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of a host without network may lead nowhere
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the other check starts CUDA, which a fork does not survive
    forkserver.ensure_running()
    return threads


def run_cases(
    cases: Iterable[Case],
    slots: list[str],
    threads: int,
    folder: Path,
    timeout: float,
    on_end: Callable[[Case, Outcome], None],
    on_start: Callable[[Case], None],
    share: int = 1,
) -> None:
    """Run cases, those of most GPUs first, side by side where there are GPUs for them; on the CPU one at a time.

    In this order powers of two leave no GPU idle before the end, and a run that is cut has the largest.

    Args:
        cases: What to run.
        slots: What CUDA_VISIBLE_DEVICES calls each GPU; on the CPU as many empty strings as a case may have ranks.
        threads: CPU threads of a rank.
        folder: For what ranks write; checkpoints of earlier cases are found there.
        timeout: Seconds for a case.
        on_end: Called with each case that has ended.
        on_start: Called with each case that begins.
        share: Cases that a GPU may have at once; more than 1 where nothing is timed.
    """
    waiting = sorted(cases, key=lambda case: -case.gpus)
    rooms = dict.fromkeys(range(len(slots)), share)  # on each GPU, for further cases
    running: list[tuple[_Running, list[int]]] = []
    try:
        while waiting or running:
            while waiting:
                # The emptiest; of those, neighbours, which are closer where links differ.
                places = sorted((place for place in rooms if rooms[place]), key=lambda place: (-rooms[place], place))
                case, places = waiting[0], sorted(places[: waiting[0].gpus])
                if len(places) < case.gpus or (running and not slots[0]):  # the cores of a CPU are shared
                    break
                waiting.pop(0)
                on_start(case)
                begun = _Running(case, [slots[place] for place in places], folder, threads)
                for other, _ in running:
                    other.beside.append(case.label)
                    begun.beside.append(other.case.label)
                running.append((begun, places))
                for place in places:
                    rooms[place] -= 1
            time.sleep(POLL)
            for over, places in [each for each in running if each[0].is_over(timeout)]:
                running.remove((over, places))
                for place in places:
                    rooms[place] += 1
                on_end(over.case, over.end())
    finally:
        for each, _ in running:
            each.kill()


def case_folder(folder: Path, label: str) -> Path:
    """Where a case's ranks write."""
    return folder / "".join(letter if letter.isalnum() else "-" for letter in label)


def free_port() -> str:
    """Return a port of this host on which nobody listens.

    Not one that the system gives to connections (32768 and above), which may take it before the rank that is to.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", random.randrange(15_000, 30_000)))
            return str(probe.getsockname()[1])


class _Running:
    """The processes of a case."""

    def __init__(self, case: Case, slots: list[str], folder: Path, threads: int) -> None:
        self.case, self.slots = case, slots
        self.beside: list[str] = []
        self.folder = case_folder(folder, case.label)
        self.folder.mkdir(parents=True)
        self.begun, self.ended, self.status = time.monotonic(), 0.0, ""
        environment = {
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "scaling"},
            **{"WORLD_SIZE": str(case.gpus), "LOCAL_WORLD_SIZE": str(case.gpus), "GROUP_RANK": "0", "NODE_RANK": "0"},
        }
        if slots[0]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slots)
        order = {"case": asdict(case), "folder": str(self.folder), "threads": threads}
        if case.resume is not None:
            order["checkpoints"] = str(case_folder(folder, case.resume) / "checkpoints")
        self.ranks: list[ForkServerProcess] = []
        for rank in range(case.gpus):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks.append(CONTEXT.Process(target=enter, args=(rank, own, order)))
            self.ranks[-1].start()

    def is_over(self, timeout: float) -> bool:
        """Look at the ranks; the first that dies ends the case, as a launcher would end it."""
        codes = [process.exitcode for process in self.ranks]  # first: a rank that is through ends right after its line
        done = [self._said(rank, "done") for rank in range(self.case.gpus)]
        dead = [code for code, through in zip(codes, done, strict=True) if code is not None and not through]
        if all(done):
            self.status = "ok"
        elif dead:
            self.ended = time.time()
            if min(dead) >= 0:  # not killed: the others may have more to say than the first
                self._wait(GRACE)
            self.status = "failed"
        elif time.monotonic() - self.begun > timeout:
            self.status = f"timeout after {timeout:g} s"
        return bool(self.status)

    def end(self) -> Outcome:
        """End all ranks, and say what came of the case."""
        ended = self.ended or time.time()
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        events = [_read(self.folder / f"rank{rank}.jsonl") for rank in range(self.case.gpus)]
        status, guilty = (self.status, 0) if self.status != "failed" else _why(codes, events)
        log = self.folder / f"rank{guilty}.log"
        text = "" if status == "ok" or not log.exists() else log.read_text(errors="replace")[-3000:]
        return Outcome(status, events, time.monotonic() - self.begun, ended, tuple(self.beside), text)

    def kill(self) -> None:
        """End all ranks at once."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))

    def _said(self, rank: int, what: str) -> bool:
        return any(what in event for event in _read(self.folder / f"rank{rank}.jsonl")[-1:])


def _why(codes: list[int | None], events: list[Events]) -> tuple[str, int]:
    """Return what happened and to which rank; what the others then say of the connection to it is no cause."""
    errors = [(e["time"], rank, e["error"]) for rank, lines in enumerate(events) for e in lines if "error" in e]
    if any(error == "OOM" for *_, error in errors):
        return "OOM", next(rank for _, rank, error in errors if error == "OOM")
    killed = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
    if errors and not killed:
        _, rank, error = min(errors)
        return f"failed: {error}", rank
    rank = killed[0] if killed else next(rank for rank, code in enumerate(codes) if code)
    code = codes[rank] or 0
    return f"failed: rank {rank} died ({f'signal {-code}' if code < 0 else f'exit code {code}'})", rank


def _read(path: Path) -> Events:
    """Return the whole lines of a rank; the last may be cut off."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def enter(rank: int, environment: dict[str, str], order: dict[str, Any]) -> None:
    """Be a rank (in its process, which ends here, without a teardown that could wait for other ranks)."""
    folder = Path(order["folder"])
    with (folder / f"rank{rank}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    lines = Lines(folder / f"rank{rank}.jsonl")
    lines.write(started=True, devices=environment.get("CUDA_VISIBLE_DEVICES"))
    failed = False
    try:
        from mhf_lightning.bench.scaling.rank import train

        with out_of_memory():
            done = train(order, lines)
        lines.write(done=done)
    except BaseException as error:
        failed = True
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        lines.write(error="OOM" if isinstance(error, OutOfMemoryError) else text)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed)


class Lines:
    """Appends JSON lines, each with the time; also from other threads."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, **values: Any) -> None:
        """Append one line, in one write."""
        self._file.write(json.dumps({**values, "time": time.time()}).encode() + b"\n")
