"""`mhf bench layer` for real, at tiny sizes: every peer runs, the files are what they say, nothing is overwritten."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhf_lightning.bench import measure, report
from mhf_lightning.bench.layer import main
from mhf_lightning.bench.peers import PEERS, Sizes
from mhf_lightning.cli import main as mhf

SIZES = Sizes(batch=2, length=6, d_model=96, d_h=24)  # E = 1: 8/3 * 96 = 256
TINY = ["--batch", "1", "--d_model", "128", "--d_h", "32", "--quick"]
CPU = torch.device("cpu")

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the command would take the GPU")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def build(name: str, sizes: Sizes = SIZES) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    peer = PEERS[name]
    return peer.module(sizes, CPU, torch.float32), peer.inputs(sizes, CPU, torch.float32)


def results(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of the input and the weights as a step of training leaves them."""
    tensors = [x, *module.parameters()]
    for tensor in tensors:
        tensor.grad = None
    y = module(x)
    y.backward(torch.ones_like(y))
    return [y.detach(), *(tensor.grad for tensor in tensors)]


@pytest.fixture(scope="module")
def all_peers(tmp_path_factory) -> Path:
    """The results of one point with every peer."""
    if torch.cuda.is_available():
        pytest.skip("the command would take the GPU")
    folder = tmp_path_factory.mktemp("bench") / "results"
    with pytest.raises(SystemExit) as end:
        mhf(["bench", "layer", *TINY, "--length", "16", "--output", str(folder)])
    assert end.value.code == 0
    return folder


def test_the_csv_has_a_row_for_every_peer(all_peers):
    rows = read(all_peers / "layer.csv")
    assert [row["peer"] for row in rows] == list(PEERS)
    for row in rows:
        if not row["status"].startswith(("not installed", "needs CUDA")):
            assert row["status"] == "ok"
            forward, backward, both = (float(row[f"{name}_ms"]) for name in ("forward", "backward", "forward_backward"))
            assert forward > 0
            assert 0 < backward < both
            flops = PEERS[row["peer"]].forward_flops(Sizes(1, 16, 128, 32))
            share = flops / (forward / 1e3) / (float(row["gemm_tflops"]) * 1e12)
            assert float(row["forward_share"]) == pytest.approx(share, rel=1e-3)
            assert row["kept_mib"] == row["inference_peak_mib"] == row["training_peak_mib"] == "n/a"
    assert {row["d_ff"] for row in rows} == {"384", "512"}
    assert {row["backend"] for row in rows if row["peer"].startswith("flash_mhf")} == {"reference"}


def test_decode_rows_and_environment(all_peers):
    rows = read(all_peers / "decode.csv")
    assert [(row["tokens"], row["status"]) for row in rows] == [("1", "ok"), ("16", "ok")]
    for row in rows:
        gb_per_s = 3 * 128 * 512 * 4 / float(row["microseconds"]) / 1e3
        assert float(row["gb_per_s"]) == pytest.approx(gb_per_s, rel=1e-3)
        assert float(row["copy_share"]) == pytest.approx(gb_per_s / float(row["copy_gb_per_s"]), rel=1e-3)
    facts = json.loads((all_peers / "environment.json").read_text())
    assert facts["torch"] == torch.__version__
    assert set(facts) >= {"date", "device", "python", "triton", "MHF_BACKEND"}


def test_one_point_gives_bars(all_peers):
    image = matplotlib.image.imread(all_peers / "layer.png")
    assert image.shape[0] > 300
    assert image.std() > 0.05


def test_existing_results_are_kept(all_peers, capsys):
    before = {path: path.read_bytes() for path in all_peers.iterdir()}
    assert main([*TINY, "--length", "16", "--output", str(all_peers)]) == 2
    assert "layer.csv exists" in capsys.readouterr().err
    assert main(["--plot_from", str(all_peers / "layer.csv")]) == 2
    assert "layer.png" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in all_peers.iterdir()} == before


@on_cpu
def test_a_sweep_prints_tables_and_draws_curves_again(tmp_path, capsys):
    sweep = ["--length", "8", "16", "--peers", "swiglu", "flash_mhf", "--output", str(tmp_path)]
    assert main([*TINY, *sweep]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| swiglu ") == printed.count("| flash_mhf ") == 2
    assert "batch 1, L 16, d_model 128, d_h 32, d_ff 384 (SwiGLU), 512 (FlashMHF)" in printed
    first = (tmp_path / "layer.png").read_bytes()
    (tmp_path / "again").mkdir()
    assert main(["--plot_from", str(tmp_path / "layer.csv"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "layer.png").read_bytes() == first
    assert matplotlib.image.imread(tmp_path / "layer.png").std() > 0.05


@on_cpu
def test_without_matplotlib_the_results_are_complete_and_the_plot_can_follow(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what `import` meets where it is not installed
    arguments = [*TINY, "--length", "8", "--peers", "swiglu", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert f"pip install matplotlib; then: mhf bench layer --plot_from {tmp_path}/layer.csv" in capsys.readouterr().err
    assert read(tmp_path / "layer.csv")[0]["status"] == "ok"
    assert main(["--plot_from", str(tmp_path / "layer.csv")]) == 2
    monkeypatch.undo()
    assert main(["--plot_from", str(tmp_path / "layer.csv")]) == 0
    assert (tmp_path / "layer.png").stat().st_size > 1000


def test_sweeps_are_found_in_the_rows():
    points = [(1024, 2048, 128), (4096, 2048, 128), (4096, 1024, 128), (4096, 2048, 64), (512, 2048, 128)]
    rows = [dict(zip(report.AXES, point, strict=True)) for point in points]
    found = {axis: report._sweep(rows, axis)[1] for axis in report.AXES}
    assert [[row[axis] for row in found[axis]] for axis in report.AXES] == [
        [1024, 4096, 512],
        [2048, 1024],
        [128, 64],
    ]
    assert report._sweep(rows[:2], "d_h") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "swiglu", "flash_mfh"], "unknown peer flash_mfh; allowed: swiglu, "),
        (["--d_model", "100", "--d_h", "32"], "d_model must be a multiple of d_h; got d_model 100 and d_h 32"),
        (["--length", "0"], "length must be at least 1; got 0"),
        (["--batch", "0"], "batch must be at least 1; got 0"),
        (["--shape", "S", "--length", "16"], "--shape S sets batch, L, d_model and d_h"),
        (["--plot_from", "missing.csv"], "missing.csv"),
    ],
)
def test_wrong_use_ends_with_a_message_and_no_folder(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_csv_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["--plot_from", str(tmp_path / "other.csv")]) == 2
    assert "is no layer.csv" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["swiglu_compiled_checkpoint", "deepspeed_tiled"])
def test_swiglu_peers_compute_swiglu(name):
    if PEERS[name].unavailable(CPU):
        pytest.skip(f"{name} is not installed")
    reference, (x,) = build("swiglu", Sizes(2, 200, 96, 24))  # three tiles
    module = PEERS[name].build(Sizes(2, 200, 96, 24))
    module.load_state_dict(reference.state_dict())
    torch.testing.assert_close(results(module, x), results(reference, x), rtol=1e-4, atol=1e-5)


def test_the_unfused_layer_computes_flash_mhf():
    sizes = Sizes(2, 6, 128, 32)
    assert sizes.num_subnetworks == 2
    fused, (x,) = build("flash_mhf", sizes)
    unfused, _ = build("mhf_unfused", sizes)
    unfused.load_state_dict(fused.state_dict())
    torch.testing.assert_close(results(unfused, x), results(fused, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swiglu", "flash_mhf", "flash_mhf_op"])
def test_model_flops_are_those_that_torch_counts(name):
    module, inputs = build(name)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        module(*inputs)
    router = 2 * SIZES.tokens * SIZES.d_model * SIZES.num_subnetworks if name == "flash_mhf" else 0  # left out
    assert PEERS[name].forward_flops(SIZES) == forward.get_total_flops() - router


def test_shape_s_is_the_released_layer():
    sizes = Sizes(8, 4096, 2048, 128)
    assert (sizes.num_heads, sizes.num_subnetworks, sizes.mhf_d_ff, sizes.swiglu_d_ff) == (16, 22, 5632, 5504)
    assert Sizes(8, 4096, 2048, 128, 384).num_subnetworks == 15
    assert [Sizes(1, 1, d_model, 64).swiglu_d_ff for d_model in (768, 1024)] == [2048, 2752]  # the paper's


def test_out_of_memory_is_recognised():
    with pytest.raises(measure.OutOfMemoryError), measure.out_of_memory():
        torch.empty(2**60, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), measure.out_of_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)


@on_cpu
def test_layers_in_a_block(tmp_path, capsys):
    names = ["swiglu", "flash_mhf", "flash_mhf_op"]
    assert main([*TINY, "--length", "16", "--in_block", "--peers", *names, "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "layer.csv")
    assert [(row["peer"], row["status"], row["in_block"]) for row in rows] == [
        (name, "ok", "yes") for name in names[:2]
    ]
    assert "with norm and residual" in capsys.readouterr().out
    sizes = Sizes(1, 16, 128, 32)
    module = PEERS["swiglu"].module(sizes, torch.device("cpu"), torch.float32, in_block=True)
    x = torch.randn(1, 16, 128)
    torch.testing.assert_close(module(x), x + module.layer(torch.nn.functional.rms_norm(x, (128,), eps=1e-6)))
    assert main([*TINY, "--in_block", "--peers", "flash_mhf_op", "--output", str(tmp_path / "op")]) == 2


@on_cpu
def test_the_width_of_a_subnetwork(tmp_path):
    assert main([*TINY, "--length", "16", "--d_e", "64", "--peers", "flash_mhf_op", "--output", str(tmp_path)]) == 0
    (row,) = read(tmp_path / "layer.csv")
    assert [row[key] for key in ("num_heads", "num_subnetworks", "d_e", "d_ff")] == ["4", "6", "64", "384"]


@on_cpu
def test_a_peer_without_memory_or_with_an_error_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    sizes = ["--batch", str(2**40), "--length", "1", "--d_model", "128", "--d_h", "32"]
    assert main([*sizes, "--quick", "--peers", "swiglu", "flash_mhf", "--output", str(tmp_path / "oom")]) == 0
    rows = read(tmp_path / "oom" / "layer.csv")
    assert [row["status"] for row in rows] == ["OOM in building"] * 2
    assert "swiglu (OOM in building)" in capsys.readouterr().out
    assert not (tmp_path / "oom" / "layer.png").exists()

    monkeypatch.setenv("MHF_BACKEND", "nonsense")
    arguments = [*TINY, "--length", "8", "--peers", "flash_mhf", "swiglu", "--output", str(tmp_path / "failed")]
    assert main(arguments) == 1
    failed, ok = read(tmp_path / "failed" / "layer.csv")
    assert failed["status"].startswith("failed in building: BackendUnavailableError: MHF_BACKEND=nonsense")
    assert ok["status"] == "ok"


def test_every_repeat_resets_and_runs_the_phases_in_order():
    calls: list[str] = []
    a, b, both = measure.Stopwatch(CPU, 0.0).medians(
        lambda: (calls.append("a"), time.sleep(0.02)), lambda: calls.append("b"), reset=lambda: calls.append("reset")
    )
    assert calls == ["reset", "a", "b"] * (2 + measure.FEWEST_CALLS)
    assert 0 <= b < 0.02 <= a <= both
