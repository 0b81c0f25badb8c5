"""What became of a run, from its folder: ``history.jsonl``, names of checkpoints, and times of last writing.

Imports the standard library, and PyYAML for a run without a history. Nothing is written.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HISTORY = "history.jsonl"
# A training run writes a line at least every half minute, under SLURM a heartbeat every second; compilation, tuning of
# kernels and a long validation can take minutes.
SILENT_SECONDS = 600.0

State = Literal["running", "completed", "preempted", "stopped", "failed", "lost"]

_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))
# What is read of each event; others may follow. A float that was not finite is null. A checkpoint's ``time`` is that of
# its commit, which may be steps later than when its step was ``done``; the first histories lack that.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "start": {
        "time": _NUMBER,
        "process_start": _NUMBER,
        "step": (int,),
        "tokens": (int,),
        "max_steps": (int,),
        "job_id": (str, type(None)),
        "parameters": (dict, type(None)),
    },
    "progress": {"time": _NUMBER, "step": (int,), "tokens": (int,), "loss": _OPTIONAL, "tokens_per_s": _OPTIONAL},
    "checkpoint": {"time": _NUMBER, "step": (int,), "tokens": (int,), "done": _OPTIONAL},
    "validation": {"time": _NUMBER, "step": (int,), "loss": _OPTIONAL, "perplexity": _OPTIONAL},
    "end": {"time": _NUMBER, "step": (int,), "tokens": (int,), "reason": (str,)},
}


@dataclass(frozen=True)
class Run:
    """What became of a run. What is not known is None.

    Attributes:
        run_dir: Its folder.
        state: ``running``; ``completed`` (all steps done); ``preempted`` (saved and left on request, to be resumed);
            ``stopped`` (ended in good order before the last step, for instance by ``trainer.max_time``); ``failed``
            (an exception); ``lost``: there is no word of an end, and nothing was written into history, event files
            and heartbeats for ``SILENT_SECONDS``: killed, stopped, or its node is gone.
        reason: The error of a failed run.
        damage: What is wrong with the history; the other values come from the lines that can be read.
        job_id: The SLURM job of the last start.
        step: Optimiser steps done, as far as written down.
        max_steps: Steps asked for.
        tokens: Tokens seen.
        loss: Of the last training step written down.
        perplexity: Of the last validation.
        tokens_per_s: Over all GPUs, as last written down.
        restarts: Starts after the first.
        goodput: Useful over all time, see :func:`goodput`.
        last_checkpoint: The newest committed one.
        parameters: ``total`` and ``non_embedding``.
        last_sign: Unix time of the last writing.
        starts: The history's start lines.
    """

    run_dir: Path
    state: State
    last_sign: float
    reason: str | None = None
    damage: str | None = None
    job_id: str | None = None
    step: int | None = None
    max_steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    tokens_per_s: float | None = None
    restarts: int = 0
    goodput: float | None = None
    last_checkpoint: Path | None = None
    parameters: dict[str, int] | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)


def read_history(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the known events of a history, and what is wrong with the file, if anything.

    A kill leaves a torn line behind: as the last one, or before the first line of the next process, which is ``start``
    or, where that failed early, ``end``. Such a line is no damage. A file that is not there is an empty history.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"{path.name} cannot be read: {error.strerror}"
    events: list[dict[str, Any]] = []
    damage = torn = None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # of JSON, or of UTF-8
            event = None
        if not isinstance(event, dict):
            damage = damage or torn
            torn = f"{path.name}: line {number} is no JSON object"
            continue
        if event.get("event") not in ("start", "end"):
            damage = damage or torn
        torn = None
        wrong = [key for key, kinds in _fields(event).items() if not isinstance(event.get(key), kinds)]
        if wrong:
            damage = damage or f"{path.name}: line {number} has no valid {wrong[0]!r}"
        elif _fields(event):
            events.append(event)
    return events, damage


def _fields(event: dict[str, Any]) -> dict[str, tuple[type, ...]]:
    return _FIELDS.get(str(event.get("event")), {})


def goodput(events: list[dict[str, Any]], going_on: bool) -> float | None:
    """Return the share of the time since the first process began in which the run got ahead for good.

    Of each start, the time from its ``start`` line until the step was done from which a later start continues: steps
    that were done again do not count, nor do start-up and waiting for a node; validation and saving do. Of the last
    start: all that is written down if it goes on or ended in good order, else up to its own last checkpoint.

    Args:
        events: Of a history.
        going_on: Whether the steps of the last start count although no checkpoint may hold them.
    """
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    if not starts:
        return None
    wall = events[-1]["time"] - events[starts[0]]["process_start"]
    kept = float("inf")
    if not going_on:
        kept = max(event["step"] for event in events[starts[-1] :] if event["event"] in ("start", "checkpoint"))
    useful = 0.0
    for i, following in reversed(list(zip(starts, [*starts[1:], len(events)], strict=True))):
        start = events[i]
        steps = [event for event in events[i + 1 : following] if event["event"] != "end"]
        done = [event for event in steps if start["step"] < event["step"] <= kept]
        if done:
            last = max(event["step"] for event in done)
            at = min(event.get("done") or event["time"] for event in done if event["step"] == last)
            useful += max(0.0, at - start["time"])
        kept = min(kept, start["step"])
    return useful / wall if wall > 0 else None


def read_run(run_dir: Path, now: float | None = None) -> Run:
    """Read a run's folder; a run without a history is told from its configuration and checkpoints.

    Args:
        run_dir: The folder.
        now: Unix time to judge silence by; the clock's by default.
    """
    events, damage = read_history(run_dir / HISTORY)
    checkpoint = _newest_checkpoint(run_dir / "checkpoints")
    last_sign = _last_sign(run_dir)
    silent = (time.time() if now is None else now) - last_sign > SILENT_SECONDS
    if not events:
        step, max_steps = checkpoint[0] if checkpoint else None, _configured_steps(run_dir)
        ended = step is not None and max_steps is not None and step >= max_steps
        return Run(
            run_dir,
            state="completed" if ended else "lost" if silent else "running",
            last_sign=last_sign,
            damage=damage,
            step=step,
            max_steps=max_steps,
            tokens=_tokens_seen(checkpoint[1]) if checkpoint else None,
            last_checkpoint=checkpoint[1] if checkpoint else None,
        )
    starts: list[dict[str, Any]] = []
    valid: list[dict[str, Any]] = []  # what later starts have not undone
    reason = None  # of the last end, unless a start follows
    for event in events:
        if event["event"] == "start":
            starts.append(event)
            valid = [earlier for earlier in valid if earlier["step"] <= event["step"]]
        valid.append(event)
        if event["event"] in ("start", "end"):
            reason = event.get("reason")
    state: State
    if reason is None:
        state = "lost" if silent else "running"
    elif reason in ("completed", "preempted", "stopped"):
        state = reason
    else:
        state = "failed"
    progress = [event for event in valid if event["event"] == "progress"]
    validations = [event for event in valid if event["event"] == "validation"]
    start = starts[-1] if starts else {}
    return Run(
        run_dir,
        state,
        last_sign,
        reason=reason.removeprefix("error: ") if reason and state == "failed" else None,
        damage=damage,
        job_id=start.get("job_id"),
        step=max(event["step"] for event in valid),  # not the last one's: a checkpoint is written down steps later
        max_steps=start.get("max_steps"),
        tokens=max((event["tokens"] for event in valid if "tokens" in event), default=None),
        loss=progress[-1].get("loss") if progress else None,
        perplexity=validations[-1].get("perplexity") if validations else None,
        tokens_per_s=progress[-1].get("tokens_per_s") if progress else None,
        restarts=max(0, len(starts) - 1),
        goodput=goodput(events, going_on=state in ("running", "completed", "stopped")),
        last_checkpoint=checkpoint[1] if checkpoint else None,
        parameters=start.get("parameters"),
        starts=starts,
    )


def find_runs(folder: Path) -> list[Path]:
    """Return the runs at or below a folder, sorted: folders with a history or a configuration.

    A run's own folder is not searched for more. Symbolic links are followed, each folder once.
    """
    runs: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for path, inner, files in os.walk(folder, followlinks=True):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if HISTORY in files or "config.yaml" in files:
            runs.append(Path(path))
            inner.clear()
    return sorted(runs)


def _newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    found = [(int(name[1]), path) for path in _list(folder) if (name := re.fullmatch(r"step-(\d+)", path.name))]
    return max(found, default=None)


def _last_sign(run_dir: Path) -> float:
    written = [run_dir, run_dir / HISTORY, run_dir / "config.yaml"]
    written += _list(run_dir / "heartbeat") + _list(run_dir / "tensorboard")
    return max(_mtime(path) for path in written)


def _list(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it is not there, or was just replaced
        return 0.0


def last_config(run_dir: Path) -> Path | None:
    """Return the configuration of a run's last start, ``config.yaml`` or a ``config-resume-N.yaml``; None without."""
    starts: dict[int, Path] = {}
    for path in _list(run_dir):
        if name := re.fullmatch(r"config(?:-resume-(\d+))?\.yaml", path.name):
            starts[int(name[1] or 0)] = path
    return starts[max(starts)] if starts else None


def _configured_steps(run_dir: Path) -> int | None:
    import yaml

    try:
        steps = yaml.safe_load((run_dir / "config.yaml").read_bytes())["trainer"]["max_steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _tokens_seen(checkpoint: Path) -> int | None:
    try:
        tokens = json.loads((checkpoint / "manifest.json").read_bytes())["about"]["tokens_seen"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tokens if isinstance(tokens, int) else None
