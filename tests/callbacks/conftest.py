"""The real clock, after tests that set another one."""

import pytest

from mhf_lightning.callbacks.timeline import ClockMark


@pytest.fixture(autouse=True)
def real_clock_afterwards(monkeypatch):
    """Tests set ``ClockMark.clock`` anew."""
    monkeypatch.setattr(ClockMark, "clock", ClockMark.__dict__["clock"])
