"""What `mhf bench` says about memory, on a CUDA device. Times are not tested: other tests may run beside these."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from mhf_lightning.bench import generate, layer, model
from mhf_lightning.model import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_memory_of_layers(tmp_path):
    sizes = ["--batch", "4", "--length", "1024", "--d_model", "1024", "--d_h", "64", "--quick"]
    layer.main([*sizes, "--output", str(tmp_path)])
    rows = {row["peer"]: row for row in read(tmp_path / "layer.csv")}
    kept = {peer: float(row["kept_mib"]) for peer, row in rows.items() if row["status"] == "ok"}
    one = 4096 * 2752 * 2 / 2**20  # an intermediate of SwiGLU
    assert kept["swiglu"] == pytest.approx(4 * one, rel=0.05)
    assert kept["swiglu_compiled"] == pytest.approx(3 * one, rel=0.05)
    assert kept["swiglu_compiled_checkpoint"] < 0.1 * one
    assert kept["flash_mhf_op"] < 0.1 * one
    assert kept["flash_mhf_compiled"] < kept["swiglu_compiled"] < kept["mhf_unfused"]
    for row in rows.values():
        if row["status"] == "ok":
            assert 8 <= float(row["inference_peak_mib"]) <= float(row["training_peak_mib"])
            assert float(row["forward_share"]) > 0
    for row in read(tmp_path / "decode.csv"):
        assert row["status"] == "ok"
        assert float(row["copy_share"]) > 0
    assert json.loads((tmp_path / "environment.json").read_text())["driver"]


@pytest.fixture
def file(tmp_path) -> Path:
    """A model of 7 million parameters."""
    ffn = {"name": "swiglu", "d_ff": 1024}
    decoder = {"vocab_size": 4096, "d_model": 512, "num_layers": 1, "num_attention_heads": 8, "ffn": ffn}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"model": {"decoder": decoder}}))
    return path


def weights_mib(file: Path) -> float:
    with torch.device("meta"):
        return sum(4 * p.numel() for p in Decoder(model.read_model(file)).parameters()) / 2**20


def test_the_training_peak_of_a_model_is_its_own(file, tmp_path):
    """Weights, gradients and AdamW's two averages, and little more: not the 256 MiB of the stopwatch."""
    sizes = ["--length", "16", "--tokens", "32", "--quick", "--only", "training", "--modes", "eager"]
    assert model.main([str(file), *sizes, "--output", str(tmp_path / "out")]) == 0
    [row] = read(tmp_path / "out" / "model.csv")
    assert 4 * weights_mib(file) <= float(row["training_peak_mib"]) <= 4 * weights_mib(file) + 128


def test_a_graph_spares_the_host(file, tmp_path):
    """With few tokens a forward takes as long as its launches; a graph is one."""
    sizes = ["--length", "16", "--tokens", "32", "--quick", "--modes", "compiled", "compiled_graph"]
    assert model.main([str(file), *sizes, "--only", "inference", "--output", str(tmp_path / "out")]) == 0
    plain, graph = read(tmp_path / "out" / "model.csv")
    assert (plain["mode"], graph["mode"]) == ("compiled", "compiled_graph")
    assert float(graph["inference_ms"]) < float(plain["inference_ms"])


def test_the_peak_of_generation_is_its_own(file, tmp_path):
    sizes = ["--batch", "1", "--prompt", "16", "--new_tokens", "4", "--quick", "--modes", "eager"]
    assert generate.main([str(file), *sizes, "--output", str(tmp_path / "out")]) == 0
    [row] = read(tmp_path / "out" / "generate.csv")
    assert weights_mib(file) / 2 <= float(row["peak_mib"]) <= weights_mib(file) / 2 + 128
