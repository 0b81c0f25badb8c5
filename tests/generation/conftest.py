"""A small corpus, and runs of which the weights are known."""

import pytest
from made_run import build, make_corpus, make_run


@pytest.fixture(scope="session")
def made_corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def made_run(made_corpus, tmp_path):
    """A run of FlashMHF."""
    return make_run(tmp_path / "run", build(), made_corpus)
