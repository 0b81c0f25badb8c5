"""The result of the comparison: tables of variants, seeds and runs, with the pictures between them."""

from __future__ import annotations

import csv
import math
import re
import statistics
from dataclasses import fields
from pathlib import Path

from mhf_lightning.bench.report import NOT_MEASURED, Row, markdown
from mhf_lightning.evidence import pictures
from mhf_lightning.evidence.summary import BASELINE, EvidenceRun, Summary, differences, read_runs, summarise

COLUMNS = f"""\
Every variant is at the learning rate of its lowest loss at the seed that all its learning rates have. Its figures are
means over the runs of that rate. "±" is the standard deviation between seeds (of a sample, n - 1), not the error of
the mean; a loss without it is of one seed. "- {BASELINE}": differences at equal seeds. "seconds to {BASELINE}" and
"FLOPs to {BASELINE}": what it took to reach the last loss of {BASELINE}, at equal seeds, over all that {BASELINE} took;
straight lines between validations, "-" where it was not reached. Parameters are without embeddings; tokens/s, MFU and
seconds without compilation, validation and checkpoints."""
SEEDS = f"""\
Validation loss at every learning rate with several seeds, and differences to {BASELINE} at equal rate and seed:"""
COMMAND = "Every run was started, by `mhf evidence run`, with this command; the whole ones are in `results.csv`:"
# What differs from run to run, or from machine to machine, in the command of `mhf evidence run`.
COMMAND_PARTS = {"run_dir": "RUN", "data.path": "DATA", "model.optimizer.lr": "LR", "seed_everything": "SEED"}


def summary_table(variants: dict[str, Summary]) -> str:
    """Return the summaries of a size as a Markdown table; what its columns mean is in ``COLUMNS``."""
    rows: list[Row] = []
    for variant, summary in variants.items():
        runs = summary.runs
        tried = ", ".join(f"{lr:g}" for lr in summary.learning_rates)
        edge = "" if summary.bracketed else ", not bracketed"
        mfus = [run.mfu for run in runs if run.mfu is not None]
        base = variants.get(BASELINE)
        rows.append(
            {
                "variant": variant,
                "parameters": runs[0].parameters,
                "lr (tried)": f"{runs[0].lr:g} ({tried}{edge})",
                "seeds": ", ".join(f"{run.seed}" for run in runs),
                "validation loss": _spread([run.loss for run in runs], ".4f"),
                f"- {BASELINE}": _spread(summary.minus(base), "+.4f") if base else None,
                "perplexity": _spread([run.perplexity for run in runs], ".3f"),
                "tokens/s": _mean([run.tokens_per_s for run in runs], ",.0f"),
                "MFU": _mean(mfus, ".1%"),
                "peak GiB": _mean([run.peak_gib for run in runs], ".2f"),
                "seconds": _mean([run.seconds for run in runs], ".0f"),
                f"seconds to {BASELINE}": _ratio(summary.to_reach(base, "seconds")) if base else None,
                "FLOPs": _mean([run.flops for run in runs], ".3g"),
                f"FLOPs to {BASELINE}": _ratio(summary.to_reach(base, "flops")) if base else None,
                "GPU": ", ".join(sorted({run.gpu for run in runs})),
                "commit": ", ".join(sorted({run.commit for run in runs})),
            }
        )
    return markdown({name: name for name in rows[0]}, rows)


def seed_table(variants: dict[str, Summary]) -> str:
    """Return the losses of a size by seed, of the learning rates with several seeds; empty where there are none."""
    rows: list[Row] = []
    base = variants[BASELINE].sweep if BASELINE in variants else {}

    def add(name: str, lr: float, losses: dict[int, float], form: str) -> None:
        by_seed = {f"seed {seed}": format(loss, form) for seed, loss in losses.items()}
        rows.append({"variant": name, "lr": f"{lr:g}", **by_seed, "mean": _spread(list(losses.values()), form)})

    for variant, summary in variants.items():
        for lr, runs in summary.sweep.items():
            if len(runs) > 1:
                add(variant, lr, {run.seed: run.loss for run in runs}, ".4f")
                if variant != BASELINE and (minus := differences(runs, base.get(lr, []))):
                    add(f"{variant} - {BASELINE}", lr, minus, "+.4f")
    if not rows:
        return ""
    seeds = sorted({name for row in rows for name in row if name.startswith("seed ")}, key=lambda name: int(name[5:]))
    return markdown({name: name for name in ("variant", "lr", *seeds, "mean")}, rows)


def pattern(run: EvidenceRun) -> str:
    """Return the command of a run with names in place of what ``COMMAND_PARTS`` and its model file say."""
    command = re.sub(rf"/{re.escape(run.size)}/(recipe|{re.escape(run.variant)})\.yaml", _config_name, run.command)
    for flag, name in COMMAND_PARTS.items():
        command = re.sub(rf"(?<=--{re.escape(flag)} )\S+", name, command)
    return command


def _config_name(found: re.Match[str]) -> str:
    return "/SIZE/recipe.yaml" if found[1] == "recipe" else "/SIZE/VARIANT.yaml"


def run_table(runs: list[EvidenceRun]) -> str:
    """Return one Markdown line for each run, below the command of all; without such a one each line has its own."""
    patterns = {pattern(run) for run in runs}
    rows: list[Row] = [
        {
            **{"size": run.size, "variant": run.variant, "lr": f"{run.lr:g}", "seed": run.seed},
            "steps": f"{run.steps}" + ("" if run.finished else " (cut)"),
            **{"validation loss": f"{run.loss:.4f}", "perplexity": f"{run.perplexity:.3f}"},
            **{"tokens/s": f"{run.tokens_per_s:,.0f}", "GPU": run.gpu, "commit": run.commit},
            **({"command": f"`{run.command}`"} if len(patterns) > 1 else {}),
        }
        for run in runs
    ]
    above = f"{COMMAND}\n\n```\n{patterns.pop()}\n```\n\n" if len(patterns) == 1 else ""
    return above + markdown({name: name for name in rows[0]}, rows)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: list[float], form: str) -> str:
    return format(statistics.fmean(values), form) if values else NOT_MEASURED


def _spread(values: list[float], form: str) -> str:
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return _mean(values, form) + (f" ± {statistics.stdev(values):{form.lstrip('+')}}" if finite else "")


def write(inputs: list[Path], out: Path) -> None:
    """Write ``results.md``, ``results.csv`` and pictures; the same bytes for the same runs, pictures aside.

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
        for run in runs:
            values = [getattr(run, column) for column in columns]
            # The event files hold 7 digits; further ones are those of a machine's arithmetic.
            writer.writerow([f"{value:.8g}" if isinstance(value, float) else value for value in values])
    parts = [f"Made by `mhf evidence table` from the event files of {len(runs)} runs.", COLUMNS]
    for size, variants in sizes.items():
        parts += [f"## {size}", summary_table(variants)]
        if by_seed := seed_table(variants):
            parts += [SEEDS, by_seed]
        parts += pictures.draw(size, variants, out)
    parts += ["## Runs", run_table(runs)]
    (out / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
