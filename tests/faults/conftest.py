"""The small runs of tests/checkpoint, and how often the faults are tried."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> str:
    """Made once."""
    from small_run import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))
