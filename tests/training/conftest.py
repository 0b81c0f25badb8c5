"""A small prepared corpus and a small model for the training tests."""

from pathlib import Path

import pytest

from mhf_lightning.data.prepare import prepare
from mhf_lightning.model import DecoderConfig, FFNConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Blocks of 16 tokens from some of the standard library's sources, vocabulary 300."""
    import json
    import sysconfig

    stdlib = Path(sysconfig.get_path("stdlib"))
    folder = tmp_path_factory.mktemp("corpus")
    files = [str(path) for path in sorted((stdlib / "json").glob("*.py")) + sorted((stdlib / "email").glob("*.py"))]
    assert json.__file__ in files
    prepare(files, str(folder / "data"), context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
    return folder / "data"


@pytest.fixture
def decoder_config() -> DecoderConfig:
    """Two layers with dropout."""
    return DecoderConfig(
        vocab_size=300,
        d_model=32,
        num_layers=2,
        num_attention_heads=2,
        ffn=FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=32),
        dropout=0.1,
    )
