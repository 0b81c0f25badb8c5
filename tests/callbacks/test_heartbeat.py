"""Beats that a watcher can read, and stacks of a process that waits, hangs in C, or was stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest

HANGS = """
import os, sys, threading, time
from pathlib import Path
os.environ["SLURM_PROCID"] = "3"
from mhf_lightning.callbacks.heartbeat import Heartbeat
heart = Heartbeat(Path(sys.argv[1]), step=5)
print((Path(sys.argv[1]) / "rank-3").read_text().split()[0], flush=True)
class Trainer: global_step = 7; sanity_checking = False
def where_it_hangs():
    print("hangs", flush=True)
    sys.stdin.readline()  # C code that holds no GIL
heart.on_train_start(Trainer, None)
for Trainer.global_step in (8, 9):
    heart.on_train_batch_end(Trainer, None)
heart.on_validation_batch_end(Trainer, None)
where_it_hangs()
"""


@pytest.fixture(scope="module")
def hanging(tmp_path_factory):
    """A process, and its folder."""
    folder = tmp_path_factory.mktemp("heartbeat")
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "5\n"  # before training starts: the step to continue from
    assert process.stdout.readline() == "hangs\n"
    yield process, folder
    process.kill()
    process.communicate()


def test_a_beat_says_steps_batches_and_time(hanging):
    text = (hanging[1] / "rank-3").read_text()
    steps, batches, at = text.split()
    assert (steps, batches) == ("9", "3")
    assert abs(float(at) - time.time()) < 600
    assert text.count("\n") == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_stacks_on_request(hanging, stopped):
    process, folder = hanging
    stacks = folder / "stacks-rank-3.txt"
    before = stacks.read_text()
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGUSR2)
    if stopped:
        time.sleep(0.2)
        assert stacks.read_text() == before
        os.kill(process.pid, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while "in <module>" not in stacks.read_text()[len(before) :]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "in where_it_hangs" in stacks.read_text()[len(before) :]
    assert process.poll() is None
