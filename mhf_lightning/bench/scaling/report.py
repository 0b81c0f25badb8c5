"""The results of `mhf bench scaling` as tables and plot, with what `mhf plan` predicts beside them."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

from mhf_lightning.bench.report import NOT_MEASURED, CsvFile, Row, markdown
from mhf_lightning.bench.scaling.cases import STRATEGIES, TENSOR_PARALLEL
from mhf_lightning.bench.scaling.results import CHECKPOINT_COLUMNS, GIB, PARITY_COLUMNS, SCALING_COLUMNS

PLAN_COLUMNS = ("stage", "model", "strategy", "gpus", "plan_peak_gib", "peak_gib", "plan_tokens_per_s", "tokens_per_s")
PLAN_MFU = 0.4  # what `mhf plan` takes unless it is told another
SHARES = ("efficiency", "mfu")
AIMS = {("ddp", 8): 0.95, ("fsdp2", 8): 0.92}  # of the efficiency
PANELS = {"tokens_per_s": "tokens/s", "efficiency": "efficiency", "peak_gib": "peak memory of a rank (GiB)"}

SCALING_HEADINGS = {
    **{"strategy": "strategy", "gpus": "GPUs", "batch": "batch", "step_ms": "step ms", "slowest_step_ms": "slowest"},
    **{"tokens_per_s_per_gpu": "tokens/s per GPU", "tokens_per_s": "tokens/s", "efficiency_share": "efficiency"},
    **{"aim_share": "aim", "mfu_share": "MFU"},
    **{"peak_gib": "peak GiB", "lowest_peak_gib": "lowest rank's", "start_s": "start s"},
}
BESIDE_HEADINGS = {"beside": "ran beside", "status": "status"}
PLAN_HEADINGS = {"plan_peak_gib": "plan: peak GiB", "plan_tokens_per_s": f"plan: tokens/s at {PLAN_MFU:.0%} MFU"}
PARITY_HEADINGS = {
    **{"model": "model", "strategy": "strategy", "gpus": "GPUs", "continues": "continues", "steps": "steps"},
    **{"loss_difference": "loss: largest difference", "median_loss_difference": "median"},
    **{"grad_norm_difference": "gradient norm: largest", "median_grad_norm_difference": "median"},
    **{"first_loss": "first loss", "last_loss": "last loss", **BESIDE_HEADINGS},
}
CHECKPOINT_HEADINGS = {
    **{"model": "model", "gpus": "GPUs", "checkpoint_gib": "GiB", "stall_s": "save: stall s", "gib_per_s": "GiB/s"},
    **{"background_stall_s": "background: stall s", "later_background_stall_s": "the next: stall s"},
    **{"background_s": "until on disk s", "step_ms": "step ms"},
    **{"background_step_ms": "while writing", "noticed_s": "kill noticed s", "started_s": "started s"},
    **{"loaded_s": "loaded s", "recovery_s": "first step s", "loss_difference": "loss difference", "status": "status"},
}


def read(folder: Path, name: str, columns: tuple[str, ...]) -> list[Row]:
    """Return the rows of a CSV file with numbers as numbers; none where there is no such file.

    Raises:
        ValueError: It is no result of `mhf bench scaling`.
    """
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise ValueError(f"{path} is no {name}.csv of mhf bench scaling: its columns differ")
        return [{key: _parsed(value) for key, value in row.items() if value != NOT_MEASURED} for row in reader]


def _parsed(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def tables(folder: Path, plans: list[Row]) -> str:
    """Return all results of a folder as Markdown.

    Args:
        folder: Of the results.
        plans: Rows of `planned`, in the order of scaling.csv; none where nothing was predicted.
    """
    parts = []
    rows = read(folder, "scaling", SCALING_COLUMNS)
    both = [row | plan for row, plan in zip(rows, plans, strict=True)] if plans else rows
    headings = {**SCALING_HEADINGS, **(PLAN_HEADINGS if plans else {}), **BESIDE_HEADINGS}
    if not any((row["strategy"], row["gpus"]) in AIMS for row in both):
        del headings["aim_share"]
    key = {"weak": "the same work for each GPU", "fixed": "a fixed global batch"}
    for stage, model in dict.fromkeys((row["stage"], row["model"]) for row in both):
        chosen = [_shown(row) for row in _in_order(both) if (row["stage"], row["model"]) == (stage, model)]
        first = chosen[0]
        title = f"{model}, {key[stage]}; L {first['L']}, {first['precision']}"
        parts.append(f"## {title}\n\n{markdown(headings, chosen)}")
    parity = read(folder, "parity", PARITY_COLUMNS)
    if parity:
        first = parity[0]
        tolerances = f"{first['loss_tolerance']:g} for the loss, {first['grad_norm_tolerance']:g} for the gradient norm"
        title = f"Against one GPU, step by step; relative differences, at most {tolerances}"
        blocks = f"{first.get('num_layers', NOT_MEASURED)} blocks, L {first['L']}, {first['precision']}"
        text = markdown(PARITY_HEADINGS, [_shown(row) for row in _in_order(parity)])
        parts.append(f"## {title}\n\n{blocks}, {first['global_batch']} sequences a step\n\n{text}")
    checkpoint = read(folder, "checkpoint", CHECKPOINT_COLUMNS)
    if checkpoint:
        title = "Checkpoints of FSDP2, and a rank that is killed"
        note = "The last four times count from the kill; ranks are forked: a start that imports takes longer."
        parts.append(f"## {title}\n\n{note}\n\n{markdown(CHECKPOINT_HEADINGS, [_shown(row) for row in checkpoint])}")
    preflight = folder / "preflight.json"
    if preflight.exists():
        parts.append(f"## All-reduce, bus bandwidth\n\n{_bandwidths(json.loads(preflight.read_text()))}")
    return "\n\n".join(parts)


def _in_order(rows: list[Row]) -> list[Row]:
    """Return rows of cases that ended in any order by model, strategy and GPUs, what was continued last."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    ways = ["single", *STRATEGIES]

    def place(row: Row) -> tuple[Any, ...]:
        return models.index(row["model"]), row.get("continues", ""), ways.index(row["strategy"]), row["gpus"]

    return sorted(rows, key=place)


def _shown(row: Row) -> Row:
    shown = row | {f"{name}_share": row[name] for name in SHARES if name in row}
    shown["aim_share"] = AIMS.get((row["strategy"], row["gpus"]))
    if "micro_batch" in row:
        shown["batch"] = f"{row['micro_batch']} x {row['accumulate']}" + (
            "" if row["compiled"] == "True" else ", eager"
        )
    for name in row:
        if name.endswith("difference"):
            shown[name] = f"{row[name]:.1e}"
        elif name.startswith("tokens_per_s"):
            shown[name] = f"{row[name]:,.0f}"
    return shown


def _bandwidths(found: dict[str, Any]) -> str:
    pairs: list[Row] = [{"gpus": f"{a} and {b}", "gb": value} for a, b, value in found["pairs_gb_per_s"]]
    together = {"gpus": f"all {len(found['nodes'])}", "gb": found["all_gb_per_s"]}
    return markdown({"gpus": "GPUs", "gb": f"GB/s ({found['backend']})"}, [*pairs, together])


def planned(rows: list[Row]) -> list[Row]:
    """Return what `mhf plan` says of each row of scaling.csv: peak memory, and tokens/s at its usual MFU."""
    from mhf_lightning.bench.model import read_model
    from mhf_lightning.callbacks.throughput import DEVICES
    from mhf_lightning.plan.gpus import GPUS
    from mhf_lightning.plan.memory import Step, trace

    plans = []
    for row in rows:
        plan = {name: row[name] for name in PLAN_COLUMNS if name in row}
        tensor_parallel = TENSOR_PARALLEL if row["strategy"] == "fsdp2_tp" else 1
        step = Step(
            read_model(Path(row["file"])),
            row["micro_batch"],
            row["L"],
            accumulate=row["accumulate"],
            precision=row["precision"],
            compile_blocks=row["compiled"] == "True",
            strategy="fsdp2" if row["strategy"] == "fsdp2_tp" else row["strategy"],
            data_parallel=row["gpus"] // tensor_parallel,
            tensor_parallel=tensor_parallel,
        )
        gpu = GPUS[DEVICES[row["device"]]] if row["device"] in DEVICES else None
        with contextlib.suppress(ValueError):  # a strategy that does not go with the model: the row says why
            plan["plan_peak_gib"] = trace(step, large_workspace=gpu is None or gpu.large_workspace).peak / GIB
        if gpu is not None:
            plan["plan_tokens_per_s"] = row["gpus"] * gpu.bf16_flops * PLAN_MFU / row["flops_per_token"]
        plans.append(plan)
    return plans


def write_report(folder: Path) -> str:
    """Write report.md, plan.csv and scaling.png into a folder of results; returns the report.

    Raises:
        ValueError: The folder holds no result, or a model file is not where it was.
        FileExistsError: The folder holds a report.
        ImportError: matplotlib is not installed.
    """
    environment = folder / "environment.json"
    if not environment.exists():
        raise ValueError(f"{folder} holds no result of mhf bench scaling: there is no environment.json")
    rows = read(folder, "scaling", SCALING_COLUMNS)
    plans = planned(rows)
    facts = "\n".join(f"{name}: {value}" for name, value in json.loads(environment.read_text()).items())
    text = f"# mhf bench scaling\n\n```\n{facts}\n```\n\n{tables(folder, plans)}\n"
    with (folder / "report.md").open("x") as file:
        file.write(text)
    if any("tokens_per_s" in row for row in rows):
        plan_file = CsvFile(folder / "plan.csv", PLAN_COLUMNS)
        for plan in plans:
            plan_file.write(plan)
        plan_file.close()
        plot(rows, plans, folder / "scaling.png")
    return text


def plot(rows: list[Row], plans: list[Row], path: Path) -> None:
    """Draw tokens/s, efficiency and memory against the GPUs; a row of panels for each stage, dots for the plan.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(row["stage"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    panels = {column: title for column, title in PANELS.items() if any(column in row for row in rows)}
    figure = Figure(figsize=(5 * len(panels), 4 * len(stages) + 1.5), layout="constrained")
    grid = figure.subplots(len(stages), len(panels), squeeze=False)
    for line, stage in zip(grid, stages, strict=True):
        for panel, (column, title) in zip(line, panels.items(), strict=True):
            for model in models:
                for strategy in strategies:
                    points = sorted(
                        (row["gpus"], row[column], plan["plan_peak_gib"])
                        for row, plan in zip(rows, plans, strict=True)
                        if (row["stage"], row["model"], row["strategy"]) == (stage, model, strategy) and column in row
                    )
                    style = {"color": f"C{strategies.index(strategy)}", "marker": "osD^v"[models.index(model) % 5]}
                    label = f"{model}, {strategy}"
                    panel.plot([x for x, *_ in points], [y for _, y, _ in points], label=label, **style)
                    if column == "peak_gib":
                        panel.plot([x for x, *_ in points], [p for *_, p in points], ls=":", mfc="none", **style)
            panel.set(title=f"{stage}: {title}", xlabel="GPUs")
            panel.set_xticks(sorted({row["gpus"] for row in rows}))
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    first = rows[0]
    figure.suptitle(f"{first['device']}, {first['date']}, torch {first['torch']}; dotted: mhf plan")
    with path.open("xb") as image:
        figure.savefig(image, format="png", dpi=110)
