"""`mhf report RUN [RUN ...] -o report.html`: one page that compares runs. Imports neither torch nor Lightning.

Exit codes: 0 written, 2 wrong use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """The options of `mhf report`."""
    parser = argparse.ArgumentParser(
        prog="mhf report",
        description="Compare runs on one HTML page that needs no network: figures, curves, speed and memory, "
        "router heat-maps, differences between the configurations. Runs may still be training.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (its --run_dir)")
    parser.add_argument(
        *("-o", "--output"), type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        try:
            from mhf_lightning.report.page import render
        except ImportError as error:
            raise ValueError(f"plotly is not installed ({error}): pip install 'mhf-lightning[report]'") from error
        from mhf_lightning.report.results import load

        if args.output.exists():
            raise ValueError(f"{args.output} exists; remove it, or choose another file with -o")
        results = load(args.runs)
        for result in results:
            for warning in result.warnings:
                print(f"mhf report: warning: {result.name}: {warning}", file=sys.stderr)
        page = render(results)
        with args.output.open("x", encoding="utf-8") as file:
            file.write(page)
    except (ValueError, OSError) as error:
        print(f"mhf report: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0
