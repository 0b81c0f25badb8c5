"""A model file for every test here."""

import pytest
from tiny_cases import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "small")
