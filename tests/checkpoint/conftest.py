"""The corpus of the small runs."""

import pytest


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> str:
    """Made once."""
    from small_run import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))
