"""What the report says of one run: its figures, its curves on four axes, its configuration. No torch, no Lightning."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mhf_lightning.redaction import redact_tree
from mhf_lightning.report.events import Events, Series, read_events
from mhf_lightning.runs import Run, last_config, read_run

AXES = {"steps": "step", "tokens": "tokens", "wall time": "hours since the first event", "FLOPs": "FLOPs of the model"}
COUNTERS = {"tokens": "train/tokens", "FLOPs": "throughput/flops"}  # scalars that give an axis
CURVES = {
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "train/perplexity": "training perplexity",
    "val/perplexity": "validation perplexity",
}
MAX_POINTS = 2000  # of a curve on the page
NOT_AVAILABLE = "n/a"
STANDARD_ERROR = "_stderr"  # end of the name of a metric


@dataclass(frozen=True)
class Curve:
    """A scalar as the page draws it: finite, thinned.

    Attributes:
        y: Values, ``[points]``.
        x: Where they lie, by axis, ``[points]``; None on an axis that the run did not log.
        left_out: Number of points that are not finite.
    """

    y: np.ndarray
    x: dict[str, np.ndarray | None]
    left_out: int


@dataclass(frozen=True)
class Evaluation:
    """What `mhf eval` found for one task or text.

    Attributes:
        task: Its name.
        step: Optimiser steps of the checkpoint.
        metrics: By name; None where a value was not finite.
    """

    task: str
    step: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Result:
    """A run of the report.

    Attributes:
        name: What the page calls it.
        run: What its history says.
        events: What its event files say.
        config: Configuration of its last start without secrets, values as JSON by dotted keys.
        evaluations: Results of `mhf eval`, in no order.
        curves: By tag of ``CURVES``.
        warnings: What could not be read or drawn, a sentence each.
    """

    name: str
    run: Run
    events: Events
    config: dict[str, str]
    evaluations: list[Evaluation]
    curves: dict[str, Curve]
    warnings: list[str]

    @property
    def tokens_per_s(self) -> float | None:
        """Average of the run; of an older one, the median over its logged windows."""
        average, windows = (self.events.values(f"throughput/{tag}") for tag in ("tokens_per_s_average", "tokens_per_s"))
        return _median(average[-1:] if average.size else windows) or self.run.tokens_per_s

    @property
    def mfu(self) -> float | None:
        """Median over the logged windows."""
        return _median(self.events.values("throughput/mfu"))

    @property
    def peak_memory(self) -> float | None:
        """Largest value over the run and its ranks, GiB."""
        return largest(self.events.values("memory/peak_gib"))

    def figures(self) -> dict[str, str]:
        """Return the run's line of the table, by column."""
        run, events = self.run, self.events
        return {
            "state": run.state,
            "steps": show(run.step, ",.0f"),
            "parameters": show((run.parameters or {}).get("total"), ",.0f"),
            "tokens": show(_first(run.tokens, events.last("train/tokens")), ",.0f"),
            "training loss": show(_first(events.last("train/loss"), run.loss), ",.4f"),
            "validation loss": show(events.last("val/loss"), ",.4f"),
            "validation perplexity": show(_first(events.last("val/perplexity"), run.perplexity), ",.2f"),
            "tokens/s": show(self.tokens_per_s, ",.0f"),
            "MFU": show(self.mfu, ".1%"),
            "peak memory (GiB)": show(self.peak_memory, ",.2f"),
            "restarts": show(run.restarts if run.starts else None, ",.0f"),
            "goodput": show(run.goodput, ".1%"),
        }


def show(value: float | None, form: str) -> str:
    """Format a figure; None becomes n/a."""
    return NOT_AVAILABLE if value is None else format(value, form)


def largest(values: np.ndarray) -> float | None:
    """Return the maximum; None of no values."""
    return float(values.max()) if values.size else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if values.size else None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def load(paths: list[Path]) -> list[Result]:
    """Read runs; each is called by its folder's name, or by its path below what all have in common where two share it.

    Raises:
        ValueError: A path is no run folder, or is given twice.
    """
    folders = [path.resolve() for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if not _is_run(folder):
            if folder.is_dir() and any(_is_run(inner) for inner in folder.iterdir()):
                raise ValueError(f"{path} is no run folder, but holds some; give those: {path}/*")
            raise ValueError(f"{path} is no run folder; give the --run_dir of mhf fit, which holds config.yaml")
        if folders.count(folder) > 1:
            raise ValueError(f"{path} is given twice")
    names = [folder.name for folder in folders]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [
        _load(folder.name if names.count(folder.name) == 1 else folder.relative_to(common).as_posix(), folder)
        for folder in folders
    ]


def _is_run(folder: Path) -> bool:
    return any((folder / entry).exists() for entry in ("config.yaml", "history.jsonl", "tensorboard"))


def _load(name: str, folder: Path) -> Result:
    run, events = read_run(folder), read_events(folder / "tensorboard")
    warnings = list(events.warnings)
    if run.damage:
        warnings.append(run.damage)
    if run.reason:
        warnings.append(f"failed: {run.reason}")
    path = last_config(folder)
    try:  # without a file, as in an archive of event files: what these hold
        if path is None and events.config is not None:
            config = parse_config(events.config, f"{folder / 'tensorboard'}: run/config")
        else:
            config = read_config(path or folder / "config.yaml")
    except ValueError as error:
        config = {}
        warnings.append(str(error))
    evaluations = []
    for path in sorted((folder / "eval").glob("*.json")):
        try:
            evaluations += read_evaluations(path)
        except ValueError as error:
            warnings.append(str(error))
    curves = {tag: curve(events, tag) for tag in CURVES}
    left_out = {tag: drawn.left_out for tag, drawn in curves.items() if drawn.left_out}
    warnings += [f"{tag}: not finite and not drawn at {number:,} steps" for tag, number in left_out.items()]
    return Result(name, run, events, config, evaluations, curves, warnings)


def read_config(path: Path) -> dict[str, str]:
    """Return the values of a configuration file; as :func:`parse_config`.

    Raises:
        ValueError: It is missing or no YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {reason}; its configuration is not compared") from error
    return parse_config(text, str(path))


def parse_config(text: str, origin: str) -> dict[str, str]:
    """Return the values of a configuration as JSON, by dotted keys, without secrets; lists count as values.

    Raises:
        ValueError: It is no YAML mapping; the message names the origin.
    """
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())  # YAML's has lines
        raise ValueError(f"{origin}: {reason}; its configuration is not compared") from error
    if not isinstance(config, dict):
        raise ValueError(f"{origin}: no mapping of keys to values; its configuration is not compared")
    return dict(_flat(redact_tree(config)[0], ""))


def _flat(config: dict[Any, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False)


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return the results of a file of `mhf eval`.

    Raises:
        ValueError: It is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for task, metrics in content["results"].items():
            values = {name: None if value is None else float(value) for name, value in metrics.items()}
            found.append(Evaluation(task, int(content["step"]), values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no results of mhf eval ({error!r}); left out") from error
    return found


def evaluation_table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the metrics of all evaluations, and a line for each: task, run, step, metrics, those of a task together.

    A standard error stands with its metric.
    """
    rows = [(e.task, number, e.step, e.metrics) for number, result in enumerate(results) for e in result.evaluations]
    rows.sort(key=lambda row: row[:3])
    names = dict.fromkeys(name for *_, metrics in rows for name in metrics if not name.endswith(STANDARD_ERROR))

    def cell(metrics: dict[str, float | None], name: str) -> str:
        error = metrics.get(name + STANDARD_ERROR)
        return show(metrics.get(name), ",.4f") + ("" if error is None else f" ± {error:,.4f}")

    lines = [
        [task, results[number].name, f"{step:,}", *(cell(metrics, name) for name in names)]
        for task, number, step, metrics in rows
    ]
    return list(names), lines


def curve(events: Events, tag: str) -> Curve:
    """Return a scalar of a run for drawing; without points where the run has none."""
    series = events.scalars.get(tag, Series())
    y = np.array(series.values, dtype=float)
    finite = np.flatnonzero(np.isfinite(y))
    kept = finite[thin(y[finite])]
    steps = np.array(series.steps, dtype=np.int64)[kept]
    x: dict[str, np.ndarray | None] = {"steps": steps}
    for axis, tag_of_counter in COUNTERS.items():
        counter = events.scalars.get(tag_of_counter, Series())
        x[axis] = at_steps(counter, steps) if counter.steps else None
    x["wall time"] = (np.array(series.times)[kept] - (events.first_time or 0)) / 3600
    return Curve(y[kept], x, len(y) - len(finite))


def thin(y: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Return the indices of at most ``limit`` points: the first, the last, and the extremes of equal stretches."""
    if len(y) <= limit:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), (limit - 2) // 2 + 1).astype(int)
    kept = {0, len(y) - 1}
    for start, stop in pairwise(edges):
        kept |= {start + int(y[start:stop].argmin()), start + int(y[start:stop].argmax())}
    return np.array(sorted(kept))


def at_steps(counter: Series, steps: np.ndarray) -> np.ndarray:
    """Read a counter at other steps than its own: linear between its points, and beyond the last as before it.

    Lightning numbers steps from 0, so a counter is 0 at step -1.
    """
    known, values = np.array([-1, *counter.steps]), np.array([0.0, *counter.values])
    slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
    return np.interp(steps, known, values) + slope * np.maximum(steps - known[-1], 0)


def differences(results: list[Result]) -> dict[str, list[str | None]]:
    """Return the configuration keys that are not the same in all runs, with a value per run; None where absent."""
    configs = [result.config for result in results]
    keys = sorted({key for config in configs for key in config})
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}
