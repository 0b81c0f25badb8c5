"""`mhf evidence corpus | run | table | efficiency`. Exit codes: 0 well, 1 a run failed, 2 wrong use."""

from __future__ import annotations

import argparse
from pathlib import Path

from mhf_lightning.errors import readable_errors

CONFIGS = Path("configs/evidence")


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mhf evidence",
        description="Compare the feed-forward variants on real text; configs/evidence/README.md is the guide.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="the Python sources of the installed packages, as a dataset")
    corpus.add_argument("--tokenizer", type=Path, default=CONFIGS / "tokenizer.json", help="Made where it is missing.")
    corpus.add_argument(
        "--record",
        type=Path,
        default=CONFIGS / "corpus.json",
        help="What the corpus is; another one is refused. Made where it is missing.",
    )
    run = commands.add_parser("run", help="work off the list of runs, one process a GPU")
    run.add_argument("--seconds", type=float, required=True, help="Time until all processes have ended.")
    run.add_argument(
        "--whole",
        action="store_true",
        help="Begin only runs that should end in that time: for a machine that is given back, with its run folders.",
    )
    run.add_argument("--out", type=Path, required=True, help="Folder for the event files of this call and the list.")
    run.add_argument(
        "--queue", type=Path, default=CONFIGS / "queue.csv", help="The list; configurations lie beside it."
    )
    run.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="Folder of the run folders.")
    table = commands.add_parser("table", help="tables and curves from event files alone")
    table.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="Archives of `run`, or folders of runs.")
    table.add_argument("--out", type=Path, required=True, help="Folder for results.md, results.csv and pictures.")
    efficiency = commands.add_parser("efficiency", help="the paper's efficiency table beside measured rows")
    efficiency.add_argument("--layer", type=Path, required=True, help="layer.csv of `mhf bench layer`.")
    efficiency.add_argument("--model", type=Path, required=True, help="model.csv of `mhf bench model`.")
    efficiency.add_argument(
        "--paper", type=Path, default=Path("configs/paper/efficiency.csv"), help="What the paper printed."
    )
    efficiency.add_argument("--out", type=Path, required=True, help="The Markdown file to write.")
    for command in (corpus, run):
        command.add_argument("--data", type=Path, default=Path("data/evidence"), help="Folder of the dataset.")
    options = parser.parse_args(args)
    with readable_errors():
        if options.command == "corpus":
            from mhf_lightning.evidence.corpus import make_corpus

            make_corpus(options.data, options.tokenizer, options.record)
            return 0
        if options.command == "efficiency":
            from mhf_lightning.evidence import efficiency as tables

            tables.write(options.layer, options.model, options.paper, options.out)
            print(f"wrote {options.out}")
            return 0
        if options.command == "table":
            from mhf_lightning.bench.report import PLOT_NEEDS
            from mhf_lightning.evidence.table import write

            try:
                write(options.inputs, options.out)
            except ImportError as error:
                raise ValueError(PLOT_NEEDS) from error
            return 0
        from mhf_lightning.bench.measure import visible_gpus
        from mhf_lightning.evidence.queue import Runner

        runner = Runner(options.queue, options.data, options.runs, options.out, visible_gpus() or [""])
        return 0 if runner.work(options.seconds, options.whole) else 1
