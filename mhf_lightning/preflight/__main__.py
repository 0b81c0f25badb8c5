"""The command: ``srun --ntasks-per-node=1 python -m mhf_lightning.preflight``.

Exit codes: 0 all is well, 1 something is wrong, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mhf_lightning.preflight.network import Link, rounds
from mhf_lightning.preflight.node import Node, check_node
from mhf_lightning.preflight.verdict import Findings, problems

LINGER = 5  # times the timeout


def main(args: list[str] | None = None) -> int:
    """Check this node, and all of them together; the first node prints what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mhf_lightning.preflight",
        description="Check the nodes of a job: GPUs, disks, clocks, and all-reduce between all pairs and over all.",
        allow_abbrev=False,
    )
    parser.add_argument("--run_dir", type=Path, default=Path(), help="Where the run is to be written.")
    parser.add_argument("--min_free_gib", type=float, default=10.0, help="Free disk needed there. Default: 10.")
    parser.add_argument("--slow", type=float, default=0.5, help="Share of the median that makes a node slow.")
    parser.add_argument("--timeout", type=float, default=60.0, help="Seconds to wait for a node, each time.")
    parser.add_argument("--json", type=Path, help="Also write what was found to this file.")
    options = parser.parse_args(args)
    if not 0 < options.timeout < float("inf"):
        parser.error(f"--timeout is {options.timeout}; give seconds")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json} lies in no folder that there is")
    rank, names = place()
    node = check_node(options.run_dir, options.min_free_gib)
    address = os.environ.get("MASTER_ADDR", names[0])
    port = int(os.environ.get("MASTER_PORT", default_port()))
    try:
        link = Link(rank, len(names), address, port, options.timeout)
        if rank > 0:
            link.put(f"report/{rank}", asdict(node))
            link.follow()
            return 0
    except (OSError, RuntimeError) as error:  # no connection; or of the store: nothing in time
        print(f"preflight: {names[rank]}: {names[0]} ({address}:{port}) does not answer: {error}", file=sys.stderr)
        # srun --kill-on-bad-exit ends all tasks with the first that fails: the first node is to say its word before.
        time.sleep(LINGER * options.timeout)
        return 1
    found = lead(link, names, node)
    wrong = problems(found, options.slow)
    show(found, wrong)
    if options.json:
        options.json.write_text(json.dumps(as_json(found, wrong), indent=2) + "\n")
    return 1 if wrong else 0


def place() -> tuple[int, list[str]]:
    """Return this process's rank and the names of all nodes; without SLURM, it is the only one.

    Raises:
        SystemExit: There is not one task on each node.
    """
    size, nodes = (int(os.environ.get(f"SLURM_{what}", "1")) for what in ("NTASKS", "STEP_NUM_NODES"))
    if size != nodes:
        print(f"preflight: {size} tasks on {nodes} nodes; start it with srun --ntasks-per-node=1", file=sys.stderr)
        raise SystemExit(2)
    names = [f"task {rank}" for rank in range(size)] if size > 1 else [socket.gethostname()]
    if shutil.which("scontrol"):  # a container may lack it
        command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")]
        hosts = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        names = hosts if len(hosts) == size else names
    return int(os.environ.get("SLURM_PROCID", "0")), names


def default_port() -> str:
    """Return a port of this job, below those that Linux gives to clients."""
    return str(20000 + (int(os.environ.get("SLURM_JOB_ID", "0")) + 6000) % 12000)


def lead(link: Link, names: list[str], node: Node) -> Findings:
    """Collect the reports, and have clocks and bandwidths measured."""

    def waiting(ranks: list[int]) -> None:
        print(f"preflight: waiting for {', '.join(names[rank] for rank in ranks)}", file=sys.stderr, flush=True)

    reports = link.get_all({rank: f"report/{rank}" for rank in range(1, link.size)}, link.seconds, waiting)
    found = Findings(names, {0: node, **{rank: Node(**reports[rank]) for rank in sorted(reports)}})
    others = list(reports)
    for rank in others:
        try:
            found.skews[rank] = link.clock_skew(rank)
        except RuntimeError:  # it has gone silent since
            del found.nodes[rank]
    if all(each.torch_gpus for each in found.nodes.values()):
        found.backend = "nccl"
    for number, disjoint in enumerate(rounds(sorted(found.nodes))):
        pairs = [pair for pair in disjoint if not any(found.hopeless(rank) for rank in pair)]
        for (a, b), value in zip(pairs, link.measure(pairs, f"pairs/{number}", found.backend), strict=True):
            found.pairs[a, b] = value
    able = [rank for rank in found.nodes if found.best(rank) is not None]
    if len(able) > 1:
        found.together = link.measure([able], "all", found.backend)[0]
    link.get_all({rank: link.order(rank, do="end") for rank in found.nodes if rank}, 5.0)
    return found


def show(found: Findings, wrong: list[tuple[str, str]]) -> None:
    """Print a table of the nodes, and the problems."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Preflight of {len(found.names)} nodes")
    for column in ("node", "GPUs", "driver", "SM clock, MHz", "run dir, GiB", "tmp, GiB", "/dev/shm, GiB", "clock, s"):
        table.add_column(column, justify="left" if column in ("node", "GPUs", "driver") else "right", overflow="fold")
    table.add_column(f"best pair, GB/s ({found.backend})", justify="right")
    table.add_column("")
    bad = {name for name, _ in wrong}
    for rank, name in enumerate(found.names):
        node = found.nodes.get(rank)
        cells = ["-"] * 8
        if node is not None:
            gpus, best, skew = node.gpus, found.best(rank), found.skews.get(rank)
            cells = [
                f"{node.torch_gpus} x {gpus[0]['name']}" if gpus else f"{node.torch_gpus}",
                gpus[0]["driver"] if gpus else "-",
                f"{slowest(gpu['sm_clock'] for gpu in gpus)} of {gpus[0]['max_sm_clock']}" if gpus else "-",
                f"{node.run_dir_gib:,.0f}",
                f"{node.tmp_gib:,.0f}",
                f"{node.shm_gib:,.1f}",
                f"{skew[0]:+.3f}" if skew else "-",
                f"{best:.3f}" if best is not None else "-",
            ]
        table.add_row(name, *cells, "[red]see below" if name in bad else "[green]well")
    console = Console(highlight=False)
    if not console.is_terminal:  # the log of a job has no width to fit into
        console.width = 1000
    console.print(table)
    if found.together is not None:
        able = sum(found.best(rank) is not None for rank in found.nodes)
        console.print(f"all-reduce over {able} nodes: {found.together:.3f} GB/s ({found.backend}, bus bandwidth)")
    for name, problem in wrong:
        console.print(f"{name}: {problem}", style="red", markup=False, soft_wrap=True)
    print(f"preflight: {'failed' if wrong else 'passed'}", flush=True)


def slowest(clocks: Iterable[str]) -> str:
    """Return the lowest of nvidia-smi's MHz; what is no number, such as ``[N/A]``, only if there is none."""
    return min(clocks, key=lambda clock: float(clock) if clock.isdecimal() else math.inf)


def as_json(found: Findings, wrong: list[tuple[str, str]]) -> dict[str, object]:
    """Return what was found as plain values."""
    names = found.names
    return {
        "ok": not wrong,
        "problems": [{"node": name, "problem": problem} for name, problem in wrong],
        "nodes": {names[rank]: asdict(node) for rank, node in found.nodes.items()},
        "clock_skew_s": {names[rank]: skew for rank, (skew, _) in found.skews.items()},
        "backend": found.backend,
        "pairs_gb_per_s": [[names[a], names[b], value] for (a, b), value in found.pairs.items()],
        "all_gb_per_s": found.together,
    }


if __name__ == "__main__":
    sys.exit(main())
