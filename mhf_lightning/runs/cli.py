"""`mhf runs`: a table of runs, one line each, from their folders. Exit codes: 0 well, 2 wrong use."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mhf_lightning.runs.read import SILENT_SECONDS, Run, find_runs, read_run

_STYLES = {"running": "cyan", "completed": "green", "preempted": "yellow", "failed": "red", "lost": "red"}
_NUMBERS = ("steps", "tokens", "loss", "perplexity", "tokens/s", "restarts", "goodput")


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mhf runs",
        description="Show one line per run at or below a folder. It reads the run folders alone.",
        epilog=f"States: running; completed; preempted (saved, to be resumed); stopped (in good order, before the last "
        f"step); failed (an error); lost (no word of an end, and nothing written for {SILENT_SECONDS / 60:.0f} "
        "minutes). Each number is the last written down: loss and tokens/s of a step up to 30 s before, perplexity "
        "of the last validation. Goodput: share of the time since the first start in which the run got ahead for good.",
        allow_abbrev=False,
    )
    parser.add_argument("dir", metavar="DIR", nargs="?", type=Path, default=Path("runs"), help="Default: runs.")
    parser.add_argument("--json", action="store_true", help="Print a JSON list instead of a table.")
    options = parser.parse_args(args)
    if not options.dir.is_dir():
        print(f"mhf runs: error: {options.dir} is no folder; give the one that holds the runs", file=sys.stderr)
        return 2
    runs = [read_run(path) for path in find_runs(options.dir)]
    if options.json:
        print(json.dumps([asdict(run) for run in runs], indent=2, default=str))
    elif not runs:
        print(f"no runs in {options.dir}: a run is a folder that holds history.jsonl or config.yaml")
    else:
        show(runs, options.dir)
    return 0


def show(runs: list[Run], folder: Path) -> None:
    """Print the table, and below it what is wrong with single runs."""
    table = Table(title=Text(f"Runs in {folder}"))
    for column in ("run", "state", "job", *_NUMBERS, "last checkpoint"):
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    notes = []
    for run in runs:
        name = folder.resolve().name if run.run_dir == folder else str(run.run_dir.relative_to(folder))
        state = "damaged" if run.damage else run.state
        steps = "-" if run.step is None else f"{run.step:,}"
        cells: list[str | Text] = [
            Text(name),
            Text(state, style=_STYLES.get(run.state, "") if not run.damage else "red"),
            Text(run.job_id or "-"),
            steps if run.max_steps is None else f"{steps} / {run.max_steps:,}",
            _number(run.tokens, ","),
            _number(run.loss, ".4f"),
            _number(run.perplexity, ",.2f"),
            _number(run.tokens_per_s, ",.0f"),
            f"{run.restarts}",
            _number(run.goodput, ".1%"),
            run.last_checkpoint.name if run.last_checkpoint else "-",
        ]
        table.add_row(*cells)
        if run.damage:
            notes.append(f"{name}: damaged: {run.damage}; the line shows what can be read")
        if run.reason:
            notes.append(f"{name}: failed: {run.reason}")
        if run.state == "lost":
            ago = (time.time() - run.last_sign) / 60
            notes.append(f"{name}: lost: no word of an end, last written {ago:,.0f} minutes ago")
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console.width = 1000
    console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
