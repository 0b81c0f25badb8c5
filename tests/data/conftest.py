"""A small corpus of real text, and a dataset prepared from it."""

import inspect
import shutil
from pathlib import Path

import pytest
from data_corpus import CONTEXT_LENGTH, write_jsonl

from mhf_lightning.data.prepare import prepare


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Paragraphs of the standard library's sources, all different."""
    import argparse
    import textwrap

    paragraphs = (inspect.getsource(argparse) + inspect.getsource(textwrap)).split("\n\n")
    return list(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph.strip()))[:300]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """Read-only: L = 64, several shards in each split."""
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(
        [str(corpus)],
        str(out),
        context_length=CONTEXT_LENGTH,
        vocab_size=400,
        validation_fraction=0.1,
        num_workers=1,
        shard_rows=20,
    )
    return out


@pytest.fixture
def dataset(prepared, tmp_path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "dataset"))
