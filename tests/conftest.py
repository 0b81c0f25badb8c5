"""What holds for all tests."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _signal_mask():
    """Undo what ``mhf fit`` does to the signals of its process, where a test calls it in this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
