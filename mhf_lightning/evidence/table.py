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

from mhf_lightning.model import Decoder, DecoderConfig, count_parameters
from mhf_lightning.report.events import Events, read_events
from mhf_lightning.report.results import at_steps

BASELINE = "swiglu"
NOT_AVAILABLE = "n/a"
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
        mfu: Median over its logged windows; None where the device's peak is not known.
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

    def minus(self, other: Summary) -> float | None:
        """Return the mean difference of the losses over the seeds that both have; None without any."""
        theirs = {run.seed: run.loss for run in other.runs}
        differences = [run.loss - theirs[run.seed] for run in self.runs if run.seed in theirs]
        return statistics.fmean(differences) if differences else None

    @property
    def bracketed(self) -> bool:
        """Whether both a smaller and a larger learning rate were worse."""
        return min(self.learning_rates) < self.runs[0].lr < max(self.learning_rates)


def read_runs(inputs: Iterable[Path]) -> list[EvidenceRun]:
    """Read archives of ``mhf evidence run`` and folders of run folders; of the same run the last one given counts.

    Raises:
        ValueError: There is no run, one is not of ``mhf evidence run``, or they are of several corpora.
    """
    runs: dict[tuple[str, str, float, int], EvidenceRun] = {}
    for path in inputs:
        with tempfile.TemporaryDirectory() as folder:
            if path.is_file():
                with tarfile.open(path) as archive:
                    archive.extractall(folder, filter="data")
            found = sorted((Path(folder) if path.is_file() else path).rglob("tensorboard"))
            if not found:
                raise ValueError(f"{path} holds no run; give archives of mhf evidence run, or its folder of runs")
            for tensorboard in found:
                run = read_run(read_events(tensorboard), f"{path}: {tensorboard.parent.name}")
                if run is not None:
                    runs[run.size, run.variant, run.lr, run.seed] = run
    corpora = sorted({run.dataset for run in runs.values()})
    if len(corpora) > 1:
        raise ValueError(f"the runs are of several corpora ({', '.join(corpora)}), so their losses do not compare")
    return sorted(runs.values(), key=lambda run: (run.size, run.variant, run.lr, run.seed))


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
    mfu, peak = events.values("throughput/mfu"), events.values("memory/peak_gib")
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
        mfu=float(np.median(mfu)) if mfu.size else None,
        peak_gib=float(peak.max()),
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
    """Return the summaries of a size as a Markdown table; differences are over the seeds that both have."""
    heads = ["variant", "parameters", "lr (tried)", "seeds", "validation loss", f"- {BASELINE}", "perplexity"]
    heads += ["tokens/s", "MFU", "peak GiB", "seconds", "FLOPs"]
    lines = []
    for variant, summary in variants.items():
        runs = summary.runs
        tried = ", ".join(f"{lr:g}" for lr in summary.learning_rates)
        edge = "" if summary.bracketed else ", not bracketed"
        difference = summary.minus(variants[BASELINE]) if BASELINE in variants else None
        mfus = [run.mfu for run in runs if run.mfu is not None]
        lines.append(
            [
                *(variant, f"{runs[0].parameters:,}", f"{runs[0].lr:g} ({tried}{edge})", f"{len(runs)}"),
                *(_spread([run.loss for run in runs], ".4f"), _show(difference, "+.4f")),
                *(_spread([run.perplexity for run in runs], ".3f"), _mean([run.tokens_per_s for run in runs], ",.0f")),
                *(_mean(mfus, ".1%"), _mean([run.peak_gib for run in runs], ".2f")),
                *(_mean([run.seconds for run in runs], ".0f"), _mean([run.flops for run in runs], ".3g")),
            ]
        )
    return _markdown(heads, lines)


def run_table(runs: list[EvidenceRun]) -> str:
    """Return one Markdown line for each run."""
    heads = ("size", "variant", "lr", "seed", "steps", "validation loss", "perplexity", "tokens/s", "GPU", "commit")
    lines = [
        [
            *(run.size, run.variant, f"{run.lr:g}", f"{run.seed}"),
            f"{run.steps}" + ("" if run.finished else " (cut)"),
            *(_show(run.loss, ".4f"), _show(run.perplexity, ".3f"), _show(run.tokens_per_s, ",.0f")),
            *(run.gpu, run.commit, f"`{run.command}`"),
        ]
        for run in runs
    ]
    return _markdown((*heads, "command"), lines)


def _show(value: float | None, form: str) -> str:
    return NOT_AVAILABLE if value is None else format(value, form)


def _mean(values: list[float], form: str) -> str:
    return _show(statistics.fmean(values) if values else None, form)


def _spread(values: list[float], form: str) -> str:
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return _mean(values, form) + deviation


def _markdown(heads: Iterable[str], lines: list[list[str]]) -> str:
    rows = [list(heads), *lines]
    texts = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([texts[0], "|" + "---|" * len(rows[0]), *texts[1:]])


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
    parts = [f"Made by `mhf evidence table` from the event files of {len(runs)} runs."]
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
