"""What holds for all tests."""

import signal
import subprocess

import pytest


@pytest.fixture(autouse=True)
def _signal_mask():
    """Undo what ``mhf fit`` does to the signals of its process, where a test calls it in this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="session")
def made_corpus(tmp_path_factory):
    """A small corpus for the runs of ``made_run.py``."""
    from made_run import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def made_run(made_corpus, tmp_path):
    """A run of FlashMHF of which the weights are known."""
    from made_run import build, make_run

    return make_run(tmp_path / "run", build(), made_corpus)
