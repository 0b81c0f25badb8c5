"""`mhf bench model` for real, with tiny models: every mode runs, the files are what they say, wrong use is named."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib.image
import pytest
import torch
import yaml
from mhf_kernels import FlashMHF
from torch._dynamo.utils import counters

from mhf_lightning.bench.measure import OutOfMemoryError, Stopwatch
from mhf_lightning.bench.model import MODES, _can_be_unfused, _can_run, _Case, main, read_model, tables
from mhf_lightning.plan.flops import flops_per_token

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the command would take the GPU")
FFN = {
    "swiglu": {"name": "swiglu", "d_ff": 64},
    "flash_mhf": {"name": "flash_mhf", "num_heads": 2, "num_subnetworks": 2, "d_e": 16},
}
DECODER = {"vocab_size": 64, "d_model": 32, "num_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for name, ffn in FFN.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"decoder": {**DECODER, "ffn": ffn}}}))
    return [str(folder / f"{name}.yaml") for name in FFN]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_mode_of_every_model_is_measured(files, tmp_path, capsys):
    sizes = ["--length", "8", "16", "--tokens", "32", "--quick", "--output", str(tmp_path)]
    assert (
        main(
            [
                *files,
                *sizes,
                "--modes",
                "eager",
                "compiled_checkpoint",
                "compiled_ffn",
                "unfused",
                "--fully_checkpointed_blocks",
                "1",
            ]
        )
        == 0
    )
    rows = read(tmp_path / "model.csv")
    modes = ["eager", "compiled_checkpoint"]
    each = [("swiglu", mode) for mode in modes] + [
        ("flash_mhf", mode) for mode in ["eager", "compiled_ffn", "compiled_checkpoint", "unfused"]
    ]
    assert [(row["model"], row["mode"]) for row in rows] == each * 2
    assert [row["batch"] for row in rows] == ["4"] * 6 + ["2"] * 6
    for row in rows:
        assert row["status"] == "ok"
        assert (row["inference_ms"] == "n/a") == (row["mode"] in ("compiled_checkpoint", "compiled_ffn"))
        assert row["fully_checkpointed_blocks"] == ("1" if row["mode"] == "compiled_ffn" else "")
        tokens_per_s = 32 / (float(row["step_ms"]) / 1e3)
        assert float(row["tokens_per_s"]) == pytest.approx(tokens_per_s, rel=1e-3)
        config = read_model(Path(files[0 if row["model"] == "swiglu" else 1]))
        share = flops_per_token(config, int(row["L"])) * tokens_per_s / float(row["gemm_tflops"]) / 1e12
        assert float(row["step_share"]) == pytest.approx(share, rel=1e-3)
    assert capsys.readouterr().out.count("| unfused ") == 2
    assert matplotlib.image.imread(tmp_path / "model.png").std() > 0.02
    assert main([*files, *sizes]) == 2
    assert "model.csv exists" in capsys.readouterr().err


class Kept:
    """Bytes that a forward within `hooks` keeps for its backward, without weights and the state of random numbers."""

    def __init__(self, decoder):
        self.weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x):
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in self.weights:
            self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x


def test_modes_that_have_nothing_to_do_are_left_out():
    kept = {
        only: {name for name, mode in MODES.items() if _can_run(mode, only, True)} for only in ("inference", "training")
    }
    assert kept["inference"] == {name for name, mode in MODES.items() if mode.checkpointing == "none"}
    assert kept["training"] == {name for name, mode in MODES.items() if not mode.graph}
    assert not any(_can_run(mode, None, False) for mode in MODES.values() if mode.graph)


def test_the_modes_compute_the_same(files, monkeypatch):
    """Each mode is what it says, and has the loss and the gradients that the model has plainly."""
    config = read_model(Path(files[1]))
    tokens = torch.randint(64, (2, 8))
    results, kept, graphs = {}, {}, {}
    for name, mode in MODES.items():
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        decoder = _Case(config, mode, 2, 8, torch.float32, Stopwatch(torch.device("cpu"), 0.1))._build(torch.float32)
        saved = Kept(decoder)
        with saved.hooks:
            sums = decoder(tokens, tokens)
        sums.nll.backward()
        results[name] = [sums.nll.detach(), *(p.grad for p in decoder.parameters())]
        kept[name], graphs[name] = sum(saved.storages.values()), counters["stats"]["unique_graphs"]
    for name, values in results.items():
        for value, expected in zip(values, results["eager"], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert graphs == {name: config.num_layers if mode.compiled else 0 for name, mode in MODES.items()}
    assert (
        kept["compiled_checkpoint"]
        < kept["compiled_ffn"]
        < kept["compiled_selective"]
        < kept["compiled"]
        < kept["eager"]
    )

    def forbidden(*_):
        raise AssertionError("the fused layer ran")

    monkeypatch.setattr(FlashMHF, "_subnetworks", forbidden)
    unfused = _Case(config, MODES["unfused"], 2, 8, torch.float32, Stopwatch(torch.device("cpu"), 0.1))
    unfused._build(torch.float32)(tokens)


def test_no_mode_has_another_gate_than_the_model(files):
    config = read_model(Path(files[1]))
    assert _can_be_unfused(config)
    config.ffn.gate = "softmax"  # the unfused layer has sigmoids
    assert not _can_be_unfused(config)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(OutOfMemoryError(), "OOM in inference", 0), (KeyError("lost"), "failed in inference: KeyError: 'lost'", 1)],
)
def test_what_inference_cannot_do_does_not_cost_the_training(files, tmp_path, monkeypatch, error, status, code):
    def fails(self):
        raise error

    monkeypatch.setattr(_Case, "_inference", fails)
    sizes = ["--length", "8", "--tokens", "16", "--quick", "--output", str(tmp_path)]
    assert main([files[0], *sizes, "--modes", "eager"]) == code
    [row] = read(tmp_path / "model.csv")
    assert (row["status"], row["inference_ms"]) == (status, "n/a")
    assert float(row["step_ms"]) > 0

    monkeypatch.setattr(_Case, "_training", fails)
    sizes[-1] = str(tmp_path / "both")
    assert main([files[0], *sizes, "--modes", "eager"]) == code
    [row] = read(tmp_path / "both" / "model.csv")
    assert row["status"] == f"{status}; {status.replace('inference', 'training')}"


def test_speed_ups_are_those_over_the_compiled_and_the_checkpointed_baseline():
    def row(model, mode, inference_ms, step_ms):
        sizes = {"L": 8, "batch": 1, "num_layers": 1, "parameters": 1, "gemm_tflops": 1.0, "status": "ok"}
        return {"model": model, "mode": mode, "inference_ms": inference_ms, "step_ms": step_ms, **sizes}

    printed = tables(
        [
            row("swiglu", "eager", 400.0, 900.0),
            row("swiglu", "compiled", 300.0, 600.0),
            row("swiglu", "compiled_checkpoint", 300.0, 800.0),
            row("swiglu", "compiled_graph", 250.0, 800.0),
            row("flash_mhf", "compiled", 200.0, 1600.0),
            row("flash_mhf", "compiled_graph", 200.0, 1600.0),
        ]
    )
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[2:]]
    speed_ups = [[cell for cell, name in zip(row, head, strict=True) if name == "speed-up"] for row in rows]
    assert speed_ups[-2:] == [["1.500", "0.500"], ["1.250", "0.500"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the model files to compare"),
        (["{file}", "--length", "7", "--tokens", "32"], "--length 7 does not divide --tokens 32"),
        (["{file}", "--length", "7", "--batch", "0"], "--batch is 0; it must be at least 1"),
        (["{file}", "--fully_checkpointed_blocks", "99"], "must be from 0 to"),
        (["{file}", "--fully_checkpointed_blocks", "1", "--modes", "eager"], "which --modes leaves out"),
        (["{file}", "--modes", "compiled_graph"], "needs a GPU"),
        (["{file}", "{file}"], "two model files have the same name"),
        (["missing.yaml"], "missing.yaml is no model file"),
        (["--plot_from", "{file}"], "is no model.csv of mhf bench model"),
    ],
)
def test_wrong_use_is_named(files, capsys, arguments, message):
    assert main([argument.format(file=files[0]) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
