"""Blocked stop signals wait; restored ones end the process, also one started with them ignored. The first SIGINT."""

import signal
import subprocess
import sys

import pytest

WAITS = """
import sys
from mhf_lightning.signals import block_stop_signals, restore_stop_signals, stop_requested
block_stop_signals()
assert not stop_requested()
print("blocked", flush=True)
sys.stdin.readline()
print(stop_requested(), flush=True)
if sys.argv[1] == "restore":
    restore_stop_signals()
    sys.stdin.readline()
"""


def start(then: str, ignored: bool) -> subprocess.Popen:
    command = [sys.executable, "-c", WAITS, then]
    if ignored:
        command = ["bash", "-c", 'trap "" USR1 TERM; exec "$@"', "rank", *command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "blocked\n"
    return process


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_blocked_signal_is_seen(number, ignored):
    process = start("leave", ignored)
    process.send_signal(number)
    assert process.communicate("\n", timeout=30)[0] == "True\n"
    assert process.returncode == 0


def test_no_signal_no_request():
    process = start("leave", False)
    assert process.communicate("\n", timeout=30)[0] == "False\n"


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_restored_signals_end_the_process(number, ignored):
    pending = start("restore", ignored)
    pending.send_signal(number)
    pending.communicate("\n", timeout=30)
    assert pending.returncode == -number


def test_children_inherit_the_mask():
    code = """
import signal, subprocess, sys
from mhf_lightning.signals import block_stop_signals
block_stop_signals()
child = subprocess.Popen(["sleep", "0.5"])
child.send_signal(signal.SIGUSR1)
sys.exit(child.wait())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


INTERRUPTED = """
import os, signal, sys
from mhf_lightning.signals import Interrupt
if sys.argv[1] == "caught":
    signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt = Interrupt()
interrupt.catch("heard")
os.kill(os.getpid(), signal.SIGINT)
print(interrupt.requested, flush=True)
if sys.argv[1] == "caught":
    interrupt.catch()
    interrupt.release()
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize(
    ("what", "said", "printed"), [("caught", "heard", "True\ninterrupted\n"), ("ignored", "", "False\n")]
)
def test_the_first_interrupt_is_remembered_unless_it_is_ignored(what, said, printed):
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "rank", sys.executable, "-c", INTERRUPTED, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, said, printed)
