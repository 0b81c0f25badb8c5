"""The runs of the comparison, from event files alone, and what a variant's seeds and learning rates come to."""

from __future__ import annotations

import math
import re
import statistics
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mhf_lightning.model import Decoder, DecoderConfig, count_parameters
from mhf_lightning.report.events import Events, read_events
from mhf_lightning.report.results import at_steps

BASELINE = "swiglu"


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
        curve: Validation ``loss``, and the ``tokens``, ``seconds`` and ``flops`` until then, ``[validations]`` each.
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
        sweep: Runs by learning rate, in order of rates and seeds.
    """

    sweep: dict[float, list[EvidenceRun]]

    @property
    def compared(self) -> dict[float, EvidenceRun]:
        """The runs by which learning rates are compared: of the smallest seed that all have, else each rate's best."""
        common = set.intersection(*({run.seed for run in runs} for runs in self.sweep.values()))
        seed = min(common, default=None)
        return {
            lr: min((run for run in runs if seed in (None, run.seed)), key=lambda run: _finite_first(run.loss))
            for lr, runs in self.sweep.items()
        }

    @property
    def runs(self) -> list[EvidenceRun]:
        """Those of the best learning rate."""
        best = min(self.compared.values(), key=lambda run: _finite_first(run.loss))
        return self.sweep[best.lr]

    @property
    def learning_rates(self) -> list[float]:
        """All that were tried."""
        return list(self.sweep)

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(run.loss for run in self.runs)

    def minus(self, other: Summary) -> list[float]:
        """Return the differences of the losses, one for each seed that both have."""
        return list(differences(self.runs, other.runs).values())

    def to_reach(self, other: Summary, axis: str) -> float | None:
        """Return how much of an axis it took to the last loss of another variant, over all that the other one took.

        Both are means over the seeds that both have. None where there is no such seed, or the loss was not reached.
        """
        seeds = {run.seed for run in self.runs} & {run.seed for run in other.runs}
        if not seeds:
            return None
        x, y = (self.curve(key, seeds) for key in (axis, "loss"))
        their_x, their_y = (other.curve(key, seeds) for key in (axis, "loss"))
        reached = np.flatnonzero(y <= their_y[-1])
        if not reached.size:
            return None
        first = reached[0]
        around = [first, max(first - 1, 0)]
        return float(np.interp(their_y[-1], y[around], x[around]) / their_x[-1])

    def curve(self, key: str, seeds: set[int] | None = None) -> np.ndarray:
        """Return the mean of a curve over its runs, or over those of some seeds."""
        mean: np.ndarray = np.mean([run.curve[key] for run in self.runs if seeds is None or run.seed in seeds], axis=0)
        return mean

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
    config = yaml.safe_load(events.config or "")
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
    """Return the summaries of finished runs by size and variant: small models and low losses first, what diverged last.

    Raises:
        ValueError: Runs of a size are of different lengths.
    """
    sweeps: dict[str, dict[str, dict[float, list[EvidenceRun]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    finished = [run for run in runs if run.finished]
    for run in sorted(finished, key=lambda run: (run.parameters, run.variant, run.lr, run.seed)):
        sweeps[run.size][run.variant][run.lr].append(run)
    for size in sweeps:
        lengths = sorted({run.steps for run in finished if run.size == size})
        if len(lengths) > 1:
            raise ValueError(f"the runs of {size} are of {lengths} steps; give those of one length")
    return {
        size: dict(
            sorted(
                ((variant, Summary(dict(sweep))) for variant, sweep in variants.items()),
                key=lambda item: _finite_first(item[1].loss),
            )
        )
        for size, variants in sweeps.items()
    }


def differences(runs: list[EvidenceRun], others: list[EvidenceRun]) -> dict[int, float]:
    """Return by how much the losses are above those of other runs, by the seeds that both have."""
    theirs = {run.seed: run.loss for run in others}
    return {run.seed: run.loss - theirs[run.seed] for run in runs if run.seed in theirs}


def _finite_first(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
