"""Measures what slurm/README.md says of restarts, on a cluster of tests/slurm: python tests/slurm/measure.py [MINUTES].

Prints a table: the cost of the ranks' agreement per step, seconds from a kill to the first resumed step, and the
goodput of a run of MINUTES (default 15; 0: leave that out) in which a rank is killed every 5 minutes.
"""

import os
import platform
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from cluster import Cluster, why_not
from job import FINAL, Job

from mhf_lightning.data.prepare import prepare
from mhf_lightning.runs import read_run

MINUTES_BETWEEN_KILLS = 5
PACE = 0.2  # seconds of each step


def agreement(cluster: Cluster, folder: Path, corpus: str) -> dict[str, str]:
    """Time inside of Preemption's hook, from when both ranks are there."""
    options = ("--trainer.val_check_interval", "1000")
    job = Job(cluster, folder, corpus, pace=PACE, steps=150, environment={"MHF_MEASURE": "1"}, options=options).submit()
    job.completes(restarts=0)
    seconds = [event["agreement"] for event in job.events(0) if "agreement" in event][20:]
    mean = statistics.mean(seconds)
    return {
        f"agreement, mean over {len(seconds)} steps of {PACE} s": f"{1e6 * mean:.0f} µs, {100 * mean / PACE:.3f} %",
        "agreement, longest": f"{1e3 * max(seconds):.1f} ms",
    }


def kills(cluster: Cluster, folder: Path, corpus: str, minutes: float) -> dict[str, str]:
    """A killed rank every few minutes."""
    steps = int(60 * minutes / PACE)
    environment = {"MHF_MAX_CRASHES": "1000"}
    options = ("--checkpoint.every_n_steps", "50", "--trainer.val_check_interval", "1000")
    job = Job(cluster, folder, corpus, pace=PACE, steps=steps, environment=environment, options=options).submit()
    job.wait_for_step(1)
    killed: list[float] = []
    due = time.monotonic() + 60 * MINUTES_BETWEEN_KILLS
    while job.show("JobState") not in FINAL:
        if time.monotonic() >= due:
            killed.append(job.signal(len(killed) % 2, signal.SIGKILL))
            due += 60 * MINUTES_BETWEEN_KILLS
        time.sleep(1)
    job.completes(restarts=len(killed))
    first: dict[int, float] = {}
    for event in job.events(0):
        if "step" in event:
            first.setdefault(event["attempt"][1], event["time"])
    resumed = [first[restart] - at for restart, at in enumerate(killed, 1)]
    goodput = read_run(job.run_dir).goodput
    seconds = ", ".join(f"{value:.0f} s" for value in resumed)
    every = f"one every {MINUTES_BETWEEN_KILLS} min, a checkpoint every {50 * PACE:.0f} s"
    return {
        f"from SIGKILL of a rank to the first resumed step, {len(resumed)} times": seconds,
        f"goodput, {len(killed)} kills, {every}": f"{100 * goodput:.1f} %",
    }


def main() -> None:
    """Print the table."""
    if why_not():
        sys.exit(why_not())
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 15.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = str(folder / "corpus")
        files = [str(path) for path in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))]
        prepare(files, corpus, context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
        cluster = Cluster(folder / "slurm", nodes=2)
        try:
            cluster.start()
            table = agreement(cluster, folder / "agreement", corpus)
            if minutes:
                table |= kills(cluster, folder / "kills", corpus, minutes)
        finally:
            cluster.stop()
    print(
        f"{date.today()}, {os.cpu_count()} CPU cores for two nodes with a rank each, load {os.getloadavg()[2]:.0f}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    for what, value in table.items():
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
