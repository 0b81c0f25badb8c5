"""A folder of packages, and the corpus made of it."""

from pathlib import Path

import pytest
from tiny_packages import CONTEXT_LENGTH, make_packages

from mhf_lightning.evidence.corpus import make_corpus


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    make_packages(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(packages, tmp_path_factory) -> Path:
    """The dataset, with its record and tokenizer beside it."""
    folder = tmp_path_factory.mktemp("evidence")
    make_corpus(folder / "data", folder / "tokenizer.json", folder / "corpus.json", [packages], CONTEXT_LENGTH)
    return folder
