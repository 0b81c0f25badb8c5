"""slurm/preflight.sbatch on real nodes: healthy ones, one behind a slow link, one that is cut off, stopped, or dead."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from cluster import Cluster, run

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.serial]
ROOT = Path(__file__).parents[2]
PREFLIGHT = ROOT / "slurm/preflight.sbatch"
WAIT = 240


class Preflight:
    """A job of preflight.sbatch on three nodes."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str, environment: dict | None = None) -> None:
        self.cluster, self.folder = cluster, folder
        # The script is given to bash by a script that waits: until then, a test can harm a node of the allocation.
        (folder / "job.sh").write_text(
            f'#!/bin/bash\ntouch "{folder}/started"\nwhile [ ! -e "{folder}/go" ]; do sleep 0.1; done\n'
            f'exec bash "{PREFLIGHT}" "$@"\n'
        )
        environment = {"PATH": f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}", **(environment or {})}
        command = ["sbatch", "--parsable", "--nodes=3", "--ntasks-per-node=1", "--no-kill", "--no-requeue"]
        command += [f"--output={folder}/out", str(folder / "job.sh"), "--json", str(folder / "found.json")]
        command += ["--run_dir", str(folder), "--min_free_gib", "0.1", *options]
        environment["OMP_NUM_THREADS"] = "1"
        self.id = cluster.slurm(*command, environment=environment, cwd=ROOT).strip()
        self.wait((folder / "started").exists)

    def go(self) -> None:
        (self.folder / "go").touch()

    def wait(self, condition) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def finish(self) -> int:
        """Wait for the end; return the exit code."""
        self.wait(lambda: self.cluster.job(self.id)["JobState"] in ("COMPLETED", "FAILED"))
        return int(self.cluster.job(self.id)["ExitCode"].partition(":")[0])

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text() if (self.folder / "out").exists() else ""

    @property
    def found(self) -> dict:
        return json.loads((self.folder / "found.json").read_text())


@pytest.fixture
def preflight(cluster, tmp_path):
    """Makes jobs, and waits for idle nodes before and after."""

    def idle() -> None:
        deadline = time.monotonic() + WAIT
        while cluster.idle() < 3:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    idle()
    jobs = []

    def make(*options: str, **kwargs) -> Preflight:
        jobs.append(Preflight(cluster, tmp_path, *options, **kwargs))
        return jobs[-1]

    yield make
    for job in jobs:
        cluster.slurm("scancel", job.id, check=False)
    idle()


def number(pattern: str, text: str) -> float:
    """The number in a text that begins with a pattern."""
    found = re.match(pattern, text)
    assert found, text
    return float(found[1])


@contextlib.contextmanager
def slowed(cluster: Cluster, node: str, rate: str):
    """Limit what a node receives and sends."""
    limit = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
    link = ["dev", f"{node[-1]}v{cluster.tag}"]
    run("tc", "qdisc", "add", *link, *limit)
    run("tc", "-n", f"{node}-{cluster.tag}", "qdisc", "add", "dev", "eth0", *limit)
    try:
        yield
    finally:
        run("tc", "qdisc", "del", *link, "root")
        run("tc", "-n", f"{node}-{cluster.tag}", "qdisc", "del", "dev", "eth0", "root")


def test_healthy_nodes_pass(preflight):
    job = preflight()
    job.go()
    assert job.finish() == 0, job.output
    found = job.found
    assert (found["ok"], found["problems"], found["backend"]) == (True, [], "gloo")
    assert list(found["nodes"]) == ["node1", "node2", "node3"]
    assert [found["nodes"][name]["host"] for name in found["nodes"]] == ["node1", "node2", "node3"]
    assert sorted((a, b) for a, b, _ in found["pairs_gb_per_s"]) == [
        ("node1", "node2"), ("node1", "node3"), ("node2", "node3")
    ]  # fmt: skip
    assert all(speed > 0 for _, _, speed in found["pairs_gb_per_s"])
    assert found["all_gb_per_s"] > 0
    assert all(abs(skew) < 1 for skew in found["clock_skew_s"].values())  # one machine, one clock
    assert "preflight: passed" in job.output


def test_every_fault_is_named_with_its_node(preflight, cluster, tmp_path):
    """A slow link, little shared memory, and a clock that is ahead; nodes of one machine have one clock, so its reading
    is shifted in the process.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, time\nif socket.gethostname() == 'node2':\n"
        "    real = time.time\n    time.time = lambda: real() + 30\n"
    )
    job = preflight(environment={"PYTHONPATH": str(tmp_path)})
    memory = ["nsenter", "-t", str(cluster.processes("node1", "slurmd")[0]), "-m", "mount", "-o"]
    run(*memory, "remount,size=64m", "/dev/shm")
    try:
        with slowed(cluster, "node3", "50mbit"):
            job.go()
            assert job.finish() == 1, job.output
    finally:
        run(*memory, "remount,size=50%", "/dev/shm")
    problems = {row["node"]: row["problem"] for row in job.found["problems"]}
    assert len(job.found["problems"]) == 3, job.output
    assert number(r"([\d.]+) GiB are the size of /dev/shm", problems["node1"]) == pytest.approx(1 / 16, abs=0.01)
    assert number(r"its clock is \+([\d.]+) s off that of node1", problems["node2"]) == pytest.approx(30, abs=1)
    # 50 Mbit/s are 0.006 GB/s, and each byte crosses the link once; a busy machine is slower.
    assert 0.0005 < number(r"slow: ([\d.]+) GB/s in its best pair", problems["node3"]) < 0.008
    for a, b, speed in job.found["pairs_gb_per_s"]:
        assert 0.0005 < speed < 0.008 or "node3" not in (a, b)
    assert "node3: slow" in job.output
    assert "preflight: failed" in job.output


def test_a_node_that_does_not_reach_the_first(preflight, cluster):
    """By the network that the run is to use; SLURM has another one to start tasks by."""
    address = f"{cluster.net}.101"
    run("ip", "-n", f"node1-{cluster.tag}", "addr", "add", f"{address}/32", "dev", "eth0")
    for node, reached in (("node2", True), ("node3", False)):
        to = ["dev", "eth0"] if reached else []
        run("ip", "-n", f"{node}-{cluster.tag}", "route", "add", *([] if reached else ["blackhole"]), address, *to)
    try:
        job = preflight("--timeout", "15", environment={"MASTER_ADDR": address})
        begun = time.monotonic()
        job.go()
        assert job.finish() == 1, job.output
        assert time.monotonic() - begun < 120
    finally:
        run("ip", "-n", f"node1-{cluster.tag}", "addr", "del", f"{address}/32", "dev", "eth0")
        for node in ("node2", "node3"):
            run("ip", "-n", f"{node}-{cluster.tag}", "route", "del", address)
    assert job.found["problems"] == [{"node": "node3", "problem": "did not answer"}]
    assert [row[:2] for row in job.found["pairs_gb_per_s"]] == [["node1", "node2"]]
    assert "preflight: waiting for node3" in job.output
    assert f"preflight: node3: node1 ({address}:" in job.output


def test_a_link_between_two_nodes_is_broken(preflight, cluster):
    """Each of them still reaches the first node."""
    job = preflight("--timeout", "10")
    route = f"{cluster.net}.12/32"
    run("ip", "-n", f"node3-{cluster.tag}", "route", "add", "blackhole", route)
    try:
        job.go()
        assert job.finish() == 1, job.output
    finally:
        run("ip", "-n", f"node3-{cluster.tag}", "route", "del", "blackhole", route)
    assert {"node": "node2 and node3", "problem": "no all-reduce between them"} in job.found["problems"]
    assert {row["node"] for row in job.found["problems"]} == {"node2 and node3", "all nodes"}


def test_a_stopped_process_is_named_and_ends_with_the_others(preflight, cluster):
    job = preflight("--timeout", "15")
    job.go()
    job.wait(lambda: cluster.processes("node2", "mhf_lightning.preflight"))
    for process in cluster.processes("node2", "mhf_lightning.preflight"):
        os.kill(process, signal.SIGSTOP)
    assert job.finish() == 1, job.output
    assert job.found["problems"] == [{"node": "node2", "problem": "did not answer"}]
    job.wait(lambda: not cluster.processes("node2", "mhf_lightning.preflight"))


def test_a_dead_node_is_named_by_srun(preflight, cluster):
    job = preflight()
    cluster.power_off("node3")
    begun = time.monotonic()
    try:
        job.go()
        assert job.finish() != 0
        assert time.monotonic() - begun < 120
    finally:
        cluster.boot("node3")
    assert "failed on node node3" in job.output
