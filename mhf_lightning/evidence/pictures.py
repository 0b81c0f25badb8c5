"""The pictures of the comparison: validation loss along a run, and against the learning rate."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mhf_lightning.evidence.summary import BASELINE, Summary

AXES = {"tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs of the model"}
# Curves begin at half of the tokens. Before, all variants fall by several nats, and what is between them, a tenth of a
# nat, would be the width of a line.
DRAWN_FROM = 0.5
# Pictures reach from the lowest loss to so many times as far as the highest losses of the variants go in the median:
# one that diverges leaves the picture and does not squeeze the others.
DRAWN_TO = 1.5


def draw(size: str, variants: dict[str, Summary], out: Path) -> list[str]:
    """Draw curves of a size's variants, of each variant with its ablations, and loss against learning rate.

    Returns:
        For each picture, the Markdown that shows it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = []
    for base, group in _together(variants).items():
        name = f"{size}.png" if base is None else f"{size}-{base}.png"
        _draw_curves(group, out / name)
        shown.append(f"![validation loss{f' of {base} and its ablations' if base else ''} at {size}]({name})")
    if swept := {name: summary for name, summary in variants.items() if len(summary.sweep) > 1}:
        name = f"{size}-learning-rates.png"
        _draw_learning_rates(swept, out / name)
        shown.append(f"![validation loss against learning rate at {size}]({name})")
    return shown


def _together(variants: dict[str, Summary]) -> dict[str | None, dict[str, Summary]]:
    """Return what is drawn together: the variants under None, and a variant with its ablations, named after it.

    The baseline is in all of them.
    """
    base_of = {name: next((b for b in variants if name.startswith(f"{b}_")), None) for name in variants}
    groups: dict[str | None, dict[str, Summary]] = defaultdict(dict)
    for name, summary in variants.items():
        groups[base_of[name]][name] = summary
    for base in sorted(base for base in groups if base is not None):
        baseline = {BASELINE: variants[BASELINE]} if BASELINE in variants else {}
        groups[base] = {base: variants[base], **baseline, **groups.pop(base)}
    return dict(groups)


def _draw_curves(variants: dict[str, Summary], path: Path) -> None:
    """Draw validation loss, mean over seeds, against tokens, seconds and FLOPs; from ``DRAWN_FROM`` of them on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6), layout="constrained")
    lines = []
    for axes, (axis, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for (variant, summary), style in zip(variants.items(), _styles(variants), strict=True):
            x, y, tokens = (summary.curve(key) for key in (axis, "loss", "tokens"))
            late = tokens >= DRAWN_FROM * tokens[-1]
            axes.plot(x[late], y[late], marker=".", label=f"{variant}, {summary.loss:.3f}", **style)
            lines.append(y[late])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss (nats a token)")
    figure.axes[0].set_ylim(*_limits(lines))
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _draw_learning_rates(variants: dict[str, Summary], path: Path) -> None:
    """Draw validation loss against learning rate: a line through ``Summary.compared``, small points for other seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    lines = []
    for (variant, summary), style in zip(variants.items(), _styles(variants), strict=True):
        compared = summary.compared
        losses = [run.loss for run in compared.values()]
        axes.plot(summary.learning_rates, losses, marker="o", label=variant, **style)
        lines.append(losses)
        others = [run for runs in summary.sweep.values() for run in runs if run.seed != compared[run.lr].seed]
        axes.scatter([run.lr for run in others], [run.loss for run in others], s=14, color=style["color"])
    rates = sorted({lr for summary in variants.values() for lr in summary.learning_rates})
    axes.set_xscale("log")
    axes.set_xticks(rates, labels=[f"{lr:g}" for lr in rates])
    axes.minorticks_off()
    axes.set_ylim(*_limits(lines))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _styles(variants: Iterable[str]) -> list[dict[str, Any]]:
    """Return how the line of each variant looks: ten colours, then dashed ones; the baseline black."""
    others = [name for name in variants if name != BASELINE]
    return [
        {"color": "black", "linewidth": 2.0}
        if name == BASELINE
        else {"color": f"C{others.index(name) % 10}", "linestyle": "-" if others.index(name) < 10 else "--"}
        for name in variants
    ]


def _limits(lines: Iterable[Iterable[float]]) -> tuple[float, float]:
    """Return the lowest and highest loss of a picture, with a margin below; see ``DRAWN_TO``."""
    finite = [line for line in (np.array([y for y in line if math.isfinite(y)]) for line in lines) if line.size]
    if not finite:
        return 0.0, 1.0
    lowest, highest = min(line.min() for line in finite), max(line.max() for line in finite)
    top = lowest + DRAWN_TO * (statistics.median(line.max() for line in finite) - lowest)
    margin = 0.04 * max(top - lowest, 0.01)
    return float(lowest - margin), float(min(highest + margin, top))
