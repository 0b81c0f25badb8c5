"""The paper's efficiency table beside ours: every cell by hand, from rows as the benchmarks write them."""

import csv
import shlex
import subprocess
from pathlib import Path

import pytest

from mhf_lightning.bench.model import main as bench_model
from mhf_lightning.cli import main

ROOT = Path(__file__).parents[2]
ABOUT = {"device": "NVIDIA H100", "dtype": "bfloat16", "torch": "2.11", "triton": "3.6", "batch": 8}
PEAKS = {192: (60.0, 40.0, 12.5), 16128: (4000.0, 2700.0, 1000.0)}
TIMES = {192: (10.0, "n/a", 8.0, 6.0, 4.0), 16128: (600.0, 500.0, 400.0, 480.0, 400.0)}


def save(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def files(tmp_path):
    peers = ("swiglu", "swiglu_compiled", "flash_mhf_compiled")
    modes = [("swiglu", "eager")] + [
        (model, mode) for mode in ("compiled", "compiled_graph") for model in ("swiglu", "flash_mhf_release")
    ]
    layers = [
        {"peer": peer, "L": length, "inference_peak_mib": peak, **ABOUT}
        for length, peaks in PEAKS.items()
        for peer, peak in zip(peers, peaks, strict=True)
    ]
    models = [
        {"model": model, "mode": mode, "L": length, "inference_ms": ms, **ABOUT}
        for length, times in TIMES.items()
        for (model, mode), ms in zip(modes, times, strict=True)
    ]
    return save(tmp_path / "layer.csv", layers), save(tmp_path / "model.csv", models)


def command(files, out):
    with pytest.raises(SystemExit) as leaving:
        main(["evidence", "efficiency", "--layer", str(files[0]), "--model", str(files[1]), "--out", str(out)])
    return leaving.value.code


def table(text, title):
    lines = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_every_cell(files, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command(files, tmp_path / "efficiency.md") == 0
    text = (tmp_path / "efficiency.md").read_text()
    assert "Batch 8." in text
    assert "NVIDIA H100, bfloat16, torch 2.11, triton 3.6" in text
    short, long = table(text, "Peak memory of a layer")
    assert (short["less than eager"], short["less than compiled"], short["paper: less"]) == ("4.80x", "3.20x", "n/a")
    assert long["flash_mhf_compiled"] == "1,000"
    assert (long["less than eager"], long["paper: SwiGLU"], long["paper: less"]) == ("4.00x", "9,966", "3.30x")
    short, long = table(text, "Latency of a model")
    assert (short["swiglu, compiled"], short["faster"]) == ("n/a", "n/a")
    assert (short["faster, graph"], long["faster, graph"]) == ("1.50x", "1.20x")
    assert (long["flash_mhf_release, compiled"], long["faster"], long["paper: faster"]) == ("400", "1.25x", "1.08x")
    assert command(files, tmp_path / "efficiency.md") == 2  # is there already
    assert (tmp_path / "efficiency.md").read_text() == text


def test_the_table_in_the_repository_is_that_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = subprocess.run(["make", "-n", "evidence"], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in made.replace("\\\n", " ").splitlines() if "evidence efficiency" in line]
    _, *arguments, out = shlex.split(line)
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, str(tmp_path / "efficiency.md")])
    assert leaving.value.code == 0
    assert (tmp_path / "efficiency.md").read_bytes() == Path(out).read_bytes(), "make evidence writes it anew"


def test_what_does_not_compare_is_refused(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    layer, model = files
    rows = list(csv.DictReader(layer.open()))
    for bad, reason in (
        ([row for row in rows if row["peer"] != "swiglu"], "lacks the peers swiglu;"),
        ([{**row, "batch": 4} for row in rows], "batch is"),
        ([{"peer": "swiglu"}], "holds no rows with the columns peer, inference_peak_mib"),
    ):
        assert command((save(tmp_path / "bad.csv", bad), model), tmp_path / "no.md") == 2
        assert reason in capsys.readouterr().err
    models = [row for row in csv.DictReader(model.open()) if row["model"] == "swiglu"]
    assert command((layer, save(tmp_path / "bad.csv", models)), tmp_path / "no.md") == 2
    assert "lacks a SwiGLU or a FlashMHF model" in capsys.readouterr().err
    assert not (tmp_path / "no.md").exists()


def test_the_benchmark_takes_a_batch(tmp_path):
    """At every length, where else the number of tokens is the same."""
    file = str(ROOT / "configs/model/swiglu.yaml")
    sizes = ["--length", "6", "8", "--batch", "3", "--quick", "--only", "inference", "--modes", "eager"]
    assert bench_model([file, *sizes, "--output", str(tmp_path)]) == 0
    assert [(row["L"], row["batch"]) for row in csv.DictReader((tmp_path / "model.csv").open())] == [
        ("6", "3"),
        ("8", "3"),
    ]
