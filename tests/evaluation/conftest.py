"""The corpus and the runs of tests/generation."""

import sys
from pathlib import Path

import pytest
from extras import is_missing

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
# Perplexity does not need the extra.
collect_ignore = ["test_eval_command.py"] if is_missing("lm_eval") else []


@pytest.fixture(scope="session")
def made_corpus(tmp_path_factory):
    from made_run import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def made_run(made_corpus, tmp_path):
    """A run of FlashMHF."""
    from made_run import build, make_run

    return make_run(tmp_path / "run", build(), made_corpus)
