"""`mhf export --to full`: two files whose names cannot meet those of another export."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mhf_lightning.checkpoint import files
from mhf_lightning.checkpoint.export import export_full
from mhf_lightning.checkpoint.trained import Trained
from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig


@pytest.fixture
def trained() -> Trained:
    config = DecoderConfig(vocab_size=8, d_model=32, num_layers=1, ffn=FFNConfig("swiglu", d_ff=8))
    return Trained(None, Path("step-7"), config, Decoder(config).state_dict(), 7, 700, None)


def test_a_name_with_dots_keeps_them(trained, tmp_path):
    for size in ("1.3b", "1.5b"):
        export_full(trained, tmp_path / f"flash-{size}.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("flash-1.3b.safetensors", "flash-1.3b.json", "flash-1.5b.safetensors", "flash-1.5b.json"),
    }
    assert json.loads((tmp_path / "flash-1.3b.json").read_text())["step"] == 7
    assert load_file(tmp_path / "flash-1.3b.safetensors").keys() == trained.weights.keys()


def test_nothing_of_another_name_is_touched_and_a_failure_leaves_nothing(trained, tmp_path, monkeypatch):
    (tmp_path / "a.safetensors.tmp").write_text("of the user")
    export_full(trained, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors.tmp").read_text() == "of the user"
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(files, "write_json", lambda path, _: path.write_text("{") and path.rename(path / "full"))
    with pytest.raises(ValueError, match=r"b/c\.json could not be written"):
        export_full(trained, tmp_path / "b/c.safetensors")
    assert list((tmp_path / "b").iterdir()) == []
    with pytest.raises(ValueError, match=r"d\.safetensors could not be written: .*File exists"):
        export_full(trained, tmp_path / "a.json/d.safetensors")


@pytest.mark.parametrize("name", ["flash-1.3b", "x.json", "x"])
def test_another_ending_is_refused(trained, name, tmp_path):
    with pytest.raises(ValueError, match=rf"name ends in .safetensors, such as .*{name}.safetensors"):
        export_full(trained, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
