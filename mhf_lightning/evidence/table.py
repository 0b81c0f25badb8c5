"""The result of the comparison, from event files alone: a table of variants, one of runs, and curves."""

from __future__ import annotations

import csv
import math
import re
import statistics
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mhf_lightning.bench.report import NOT_MEASURED, Row, markdown
from mhf_lightning.model import Decoder, DecoderConfig, count_parameters
from mhf_lightning.report.events import Events, read_events
from mhf_lightning.report.results import at_steps

BASELINE = "swiglu"
COLUMNS = f"""\
Every variant is at the learning rate of its lowest loss at the seed that all its learning rates have. Its figures are
means over the runs of that rate, ± their standard deviation; "- {BASELINE}": of the differences at equal seeds.
Parameters are without embeddings; tokens/s, MFU and seconds without compilation, validation and checkpoints."""
AXES = {"tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs of the model"}


@dataclass(frozen=True)
class EvidenceRun:
    """A run, as its event files tell it.

    Attributes:
        size: Folder of its configurations.
        variant: Its model file.
        lr: Peak learning rate.
        seed: Of its weights.
        parameters: Without embeddings.
        steps: Optimiser steps done.
        finished: Whether those are all.
        tokens: Tokens trained on.
        flops: FLOPs of the model for them.
        seconds: Time for them, without compilation, validation and checkpoints.
        loss: Of the last validation, in nats a token.
        perplexity: Of the same.
        tokens_per_s: Average of the run.
        mfu: Average of the run, by the same clock; None where the device's peak is not known.
        peak_gib: Peak memory.
        gpu: Name of the device; ``cpu`` without one.
        commit: Of the code.
        dataset: Beginning of the dataset's id.
        command: How it was started.
        curve: Validation loss along ``AXES``, and ``loss``, ``[validations]`` each.
    """

    size: str
    variant: str
    lr: float
    seed: int
    parameters: int
    steps: int
    finished: bool
    tokens: float
    flops: float
    seconds: float
    loss: float
    perplexity: float
    tokens_per_s: float
    mfu: float | None
    peak_gib: float
    gpu: str
    commit: str
    dataset: str
    command: str
    curve: dict[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True)
class Summary:
    """A variant at its best learning rate, that of the lowest loss of the seed that all its learning rates have.

    Attributes:
        runs: Of that learning rate.
        learning_rates: All that were tried.
    """

    runs: list[EvidenceRun]
    learning_rates: list[float]

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(run.loss for run in self.runs)

    def minus(self, other: Summary) -> list[float]:
        """Return the differences of the losses, one for each seed that both have."""
        theirs = {run.seed: run.loss for run in other.runs}
        return [run.loss - theirs[run.seed] for run in self.runs if run.seed in theirs]

    @property
    def bracketed(self) -> bool:
        """Whether both a smaller and a larger learning rate were worse."""
        return min(self.learning_rates) < self.runs[0].lr < max(self.learning_rates)


def read_runs(inputs: Iterable[Path]) -> list[EvidenceRun]:
    """Read archives of ``mhf evidence run`` and folders of run folders.

    Of a run that was made several times the one that was begun last counts; of those that are finished, where any is.

    Raises:
        ValueError: There is no run, one is not of ``mhf evidence run``, or they are of several corpora.
    """
    runs: list[tuple[tuple[bool, float, int], EvidenceRun]] = []
    for path in inputs:
        with tempfile.TemporaryDirectory() as folder:
            if path.is_file():
                with tarfile.open(path) as archive:
                    archive.extractall(folder, filter="data")
            found = sorted((Path(folder) if path.is_file() else path).rglob("tensorboard"))
            if not found:
                raise ValueError(f"{path} holds no run; give archives of mhf evidence run, or its folder of runs")
            for tensorboard in found:
                events = read_events(tensorboard)
                run = read_run(events, f"{path}: {tensorboard.parent.name}")
                if run is not None:
                    runs.append(((run.finished, events.first_time or 0.0, run.steps), run))
    if not runs:
        raise ValueError("no run got as far as its first validation")
    runs.sort(key=lambda item: item[0])
    last = {(run.size, run.variant, run.lr, run.seed): run for _, run in runs}
    corpora = sorted({run.dataset for run in last.values()})
    if len(corpora) > 1:
        raise ValueError(f"the runs are of several corpora ({', '.join(corpora)}), so their losses do not compare")
    return [run for _, run in sorted(last.items())]


def read_run(events: Events, origin: str) -> EvidenceRun | None:
    """Read one run; None where it was cut before its first validation.

    Raises:
        ValueError: It was not started by ``mhf evidence run``.
    """
    if "run/environment" not in events.texts:
        return None
    environment = dict(re.findall(r"^\| (\S+) \| `(.*)` \|$", events.texts["run/environment"], re.M))
    missing = [name for name in ("MHF_COMMAND", "MHF_COMMIT", "MHF_DATASET") if name not in environment]
    if missing:
        raise ValueError(f"{origin}: {', '.join(missing)} not in its environment; start it with mhf evidence run")
    config = yaml.safe_load(events.texts["run/config"].strip("`").removeprefix("yaml\n"))
    series = events.scalars["val/loss"]
    if not series.steps or not events.scalars["throughput/tokens_per_s_average"].steps:
        return None
    steps = np.array(series.steps)
    tokens, flops = (at_steps(events.scalars[tag], steps) for tag in ("train/tokens", "throughput/flops"))
    rates = events.scalars["throughput/tokens_per_s_average"]
    seconds = tokens / np.interp(steps, rates.steps, rates.values)
    model = re.findall(r"--config (\S+)\.yaml", environment["MHF_COMMAND"])[-1].split("/")
    mfu, windows = events.last("throughput/mfu"), events.last("throughput/tokens_per_s")
    return EvidenceRun(
        size=model[-2],
        variant=model[-1],
        lr=float(config["model"]["optimizer"]["lr"]),
        seed=int(config["seed_everything"]),
        parameters=count(config["model"]["decoder"]),
        steps=int(steps[-1]) + 1,  # Lightning numbers them from 0
        finished=int(steps[-1]) + 1 >= config["trainer"]["max_steps"],
        tokens=float(tokens[-1]),
        flops=float(flops[-1]),
        seconds=float(seconds[-1]),
        loss=series.values[-1],
        perplexity=events.scalars["val/perplexity"].values[-1],
        tokens_per_s=rates.values[-1],
        mfu=None if mfu is None or not windows else rates.values[-1] * mfu / windows,
        peak_gib=float(events.values("memory/peak_gib").max()),
        gpu=environment.get("gpu", "cpu").removeprefix("1 x "),
        commit=environment["MHF_COMMIT"],
        dataset=environment["MHF_DATASET"],
        command=environment["MHF_COMMAND"],
        curve={"loss": np.array(series.values), "tokens": tokens, "seconds": seconds, "flops": flops},
    )


def count(decoder: dict[str, Any]) -> int:
    """Return the number of parameters outside the embedding."""
    with torch.device("meta"):
        return count_parameters(Decoder(DecoderConfig.from_dict(decoder))).non_embedding


def summarise(runs: list[EvidenceRun]) -> dict[str, dict[str, Summary]]:
    """Return the summaries of finished runs by size and variant, the lowest loss first; what diverged is last.

    Raises:
        ValueError: Runs of a size are of different lengths.
    """
    by_variant: dict[tuple[str, str], list[EvidenceRun]] = defaultdict(list)
    for run in runs:
        if run.finished:
            by_variant[run.size, run.variant].append(run)
    sizes: dict[str, dict[str, Summary]] = defaultdict(dict)
    for size in {size for size, _ in by_variant}:
        lengths = sorted({run.steps for run in runs if run.finished and run.size == size})
        if len(lengths) > 1:
            raise ValueError(f"the runs of {size} are of {lengths} steps; give those of one length")
    for (size, variant), group in by_variant.items():
        rates = sorted({run.lr for run in group})
        seeds = [{run.seed for run in group if run.lr == lr} for lr in rates]
        common = set.intersection(*seeds)
        compared = [run for run in group if run.seed == min(common, default=None)] or group
        best = min(compared, key=lambda run: _finite_first(run.loss)).lr
        sizes[size][variant] = Summary([run for run in group if run.lr == best], rates)
    return {
        size: dict(sorted(variants.items(), key=lambda item: _finite_first(item[1].loss)))
        for size, variants in sizes.items()
    }


def _finite_first(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def summary_table(variants: dict[str, Summary]) -> str:
    """Return the summaries of a size as a Markdown table; what its columns mean is in ``COLUMNS``."""
    rows: list[Row] = []
    for variant, summary in variants.items():
        runs = summary.runs
        tried = ", ".join(f"{lr:g}" for lr in summary.learning_rates)
        edge = "" if summary.bracketed else ", not bracketed"
        mfus = [run.mfu for run in runs if run.mfu is not None]
        rows.append(
            {
                "variant": variant,
                "parameters": runs[0].parameters,
                "lr (tried)": f"{runs[0].lr:g} ({tried}{edge})",
                "seeds": ", ".join(f"{run.seed}" for run in runs),
                "validation loss": _spread([run.loss for run in runs], ".4f"),
                f"- {BASELINE}": _spread(summary.minus(variants[BASELINE]), "+.4f") if BASELINE in variants else None,
                "perplexity": _spread([run.perplexity for run in runs], ".3f"),
                "tokens/s": _mean([run.tokens_per_s for run in runs], ",.0f"),
                "MFU": _mean(mfus, ".1%"),
                "peak GiB": _mean([run.peak_gib for run in runs], ".2f"),
                "seconds": _mean([run.seconds for run in runs], ".0f"),
                "FLOPs": _mean([run.flops for run in runs], ".3g"),
                "GPU": ", ".join(sorted({run.gpu for run in runs})),
                "commit": ", ".join(sorted({run.commit for run in runs})),
            }
        )
    return markdown({name: name for name in rows[0]}, rows)


def run_table(runs: list[EvidenceRun]) -> str:
    """Return one Markdown line for each run."""
    rows: list[Row] = [
        {
            **{"size": run.size, "variant": run.variant, "lr": f"{run.lr:g}", "seed": run.seed},
            "steps": f"{run.steps}" + ("" if run.finished else " (cut)"),
            **{"validation loss": f"{run.loss:.4f}", "perplexity": f"{run.perplexity:.3f}"},
            **{"tokens/s": f"{run.tokens_per_s:,.0f}", "GPU": run.gpu, "commit": run.commit},
            "command": f"`{run.command}`",
        }
        for run in runs
    ]
    return markdown({name: name for name in rows[0]}, rows)


def _mean(values: list[float], form: str) -> str:
    return format(statistics.fmean(values), form) if values else NOT_MEASURED


def _spread(values: list[float], form: str) -> str:
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return _mean(values, form) + (f" ± {statistics.stdev(values):{form.lstrip('+')}}" if finite else "")


def draw(variants: dict[str, Summary], path: Path) -> None:
    """Draw validation loss, mean over seeds, against tokens, seconds and FLOPs.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, (axis, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for variant, summary in variants.items():
            x, y = (np.mean([run.curve[key] for run in summary.runs], axis=0) for key in (axis, "loss"))
            axes.plot(x, y, marker=".", label=f"{variant}, {summary.loss:.3f}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss (nats a token)")
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def write(inputs: list[Path], out: Path) -> None:
    """Write ``results.md``, ``results.csv`` and a picture for each size, and one for each variant's ablations.

    Raises:
        ValueError: The inputs hold no comparable runs.
        ImportError: matplotlib is not installed.
    """
    runs = read_runs(inputs)
    sizes = summarise(runs)
    out.mkdir(parents=True, exist_ok=True)
    columns = [column.name for column in fields(EvidenceRun) if column.name != "curve"]
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([getattr(run, column) for column in columns] for run in runs)
    parts = [f"Made by `mhf evidence table` from the event files of {len(runs)} runs.", COLUMNS]
    for size, variants in sizes.items():
        parts += [f"## {size}", summary_table(variants)]
        for base, group in pictures(variants).items():
            name = f"{size}.png" if base is None else f"{size}-{base}.png"
            draw(group, out / name)
            parts.append(f"![validation loss{f' of {base} and its ablations' if base else ''} at {size}]({name})")
    parts += ["## Runs", run_table(runs)]
    (out / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def pictures(variants: dict[str, Summary]) -> dict[str | None, dict[str, Summary]]:
    """Return what is drawn together: the variants under None, and a variant with its ablations, named after it."""
    base_of = {name: next((b for b in variants if name.startswith(f"{b}_")), None) for name in variants}
    groups: dict[str | None, dict[str, Summary]] = defaultdict(dict)
    for name, summary in variants.items():
        groups[base_of[name]][name] = summary
    for base in sorted(base for base in groups if base is not None):
        groups[base] = {base: variants[base], **groups.pop(base)}
    return dict(groups)
