"""rank.sh alone, around a program that stands for mhf: signals, exit codes, and what it says of its start."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

RANK = Path(__file__).parents[2] / "slurm/rank.sh"
# Opens the pipe as torch's DumpPipe does, and reports what comes through it.
READS_A_PIPE = """#!/usr/bin/env python3
import os, sys, time
name = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + os.environ["SLURM_PROCID"] + ".pipe"
os.mkfifo(name)
pipe = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
print("ready", flush=True)
while not (read := os.read(pipe, 128)):
    time.sleep(0.05)
print(name, read.decode().strip(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def rank(tmp_path):
    """Starts rank.sh with a program as mhf."""
    started = []

    def start(mhf: str) -> subprocess.Popen:
        program = tmp_path / "bin/mhf"
        program.parent.mkdir()
        program.write_text(mhf)
        program.chmod(0o755)
        environment = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
        environment |= {"SLURM_PROCID": "3", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURMD_NODENAME": "node2"}
        environment |= {"MHF_START_DIR": str(tmp_path / "start"), "TMPDIR": str(tmp_path)}
        started.append(
            subprocess.Popen(
                ["bash", str(RANK)], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_the_flight_recorder_is_asked_for_and_signals_end_nothing(rank, tmp_path):
    process = rank(READS_A_PIPE)
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        os.killpg(process.pid, number)  # to rank.sh and mhf, as scancel does
    pipe, read = process.stdout.readline().split()
    assert read == "dump"
    assert Path(pipe).parent.stat().st_mode & 0o77 == 0  # nobody else can put anything in the pipe's place
    time.sleep(0.2)
    assert process.poll() is None


@pytest.mark.parametrize(("code", "end"), [(0, 0), (1, 1), (75, 0)])
def test_the_first_rank_to_fail_says_why(rank, tmp_path, code, end):
    (tmp_path / "start").mkdir()
    assert rank(f"#!/bin/sh\nexit {code}\n").wait() == end
    said = tmp_path / "start/exit"
    assert (said.read_text() if said.exists() else None) == (f"{code} 3 node2\n" if code else None)


def test_a_rank_of_an_earlier_start_says_nothing_of_this_one(rank, tmp_path):
    """pretrain.sbatch removes the folder of a start when the next one begins."""
    assert rank("#!/bin/sh\nexit 9\n").wait() == 9
    assert not (tmp_path / "start").exists()
