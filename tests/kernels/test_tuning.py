"""The tuning table, what tuning leaves out, and that one rank tunes for all."""

from __future__ import annotations

import datetime
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
from mhf_kernels import triton_backend, tune, tuning
from triton.runtime.errors import PTXASError

NAME = tuning.key("forward", "sm_00", 128, "half")


def test_rows_round_trip_through_a_table_file(tmp_path):
    rows = {NAME: tuning.Tile(128, 64, 8, 3, 1), tuning.key("decode", "sm_00", 64, "half"): tuning.Tile(16, 32, 4, 2)}
    path = tmp_path / "table.json"
    path.write_text(tuning.dump(rows, {"sm_00": "a GPU"}))
    assert tuning.read(path) == rows
    assert tuning.measured(path) == {"sm_00": "a GPU"}
    assert tuning.read(tmp_path / "missing.json") == tuning.measured(tmp_path / "missing.json") == {}


def test_the_shipped_table_has_every_kernel_of_hopper_and_others_get_a_default():
    for kernel in tuning.KERNELS:
        for block_d in (32, 64, 128, 256):
            for dtype in ("half", "float32"):
                assert tuning.lookup(kernel, "sm_90", block_d, dtype)[1] == "tuned"
        assert tuning.lookup(kernel, "sm_80", 128, "half") == (tuning.default(kernel, 128, "half"), "default")


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune"])
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA device here"):
        tune.main()


@pytest.fixture
def a_gpu(monkeypatch):
    """Let tuning believe in a GPU named sm_00; nothing is launched on it. Yields the table of this process."""
    rows: dict[str, tuning.Tile] = {}
    monkeypatch.setattr(tuning, "table", lambda: rows)
    monkeypatch.setattr(triton_backend, "arch", lambda device: "sm_00")
    monkeypatch.setattr(tune, "_inputs", lambda *_: ([(torch.ones(1, 8),) * 5], torch.ones(1, 8)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return rows


def test_the_command_keeps_what_measured_the_rows_of_other_gpus(monkeypatch, tmp_path, a_gpu):
    path = tmp_path / "table.json"
    other = {tuning.key("forward", "sm_99", 128, "half"): tuning.Tile(64, 64, 4, 2)}
    path.write_text(tuning.dump(other, {"sm_99": "another GPU", "sm_00": "this GPU, long ago"}))
    monkeypatch.setattr("sys.argv", ["tune", "--output", str(path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "this GPU")
    monkeypatch.setattr(tune, "tune", lambda *_: {NAME: tuning.Tile(128, 64, 8, 3)})
    tune.main()
    assert tuning.read(path) == {**other, NAME: tuning.Tile(128, 64, 8, 3)}
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python "
    measured = tuning.measured(path)
    assert measured.pop("sm_00").startswith(f"this GPU, {versions}")
    assert measured == {"sm_99": "another GPU"}


@pytest.mark.parametrize("error", [PTXASError("bad"), triton.OutOfResources(2, 1, "bad"), RuntimeError("bad"), None])
def test_a_candidate_that_cannot_run_says_why(monkeypatch, a_gpu, error):
    def run(*_):
        if error is not None:
            raise error

    monkeypatch.setattr(tune, "_call", run)
    reason = tune._compile(("forward", 128, "half", tuning.Tile(128, 64, 8, 3)))
    assert (reason is None) if error is None else (type(error).__name__ in reason and "bad" in reason)


def test_a_candidate_that_gave_way_to_the_default_cannot_run(monkeypatch, a_gpu):
    monkeypatch.setattr(tune, "_call", lambda *_: warnings.warn("too large", triton_backend.TileWarning, stacklevel=1))
    assert tune._compile(("decode", 128, "half", tuning.Tile(16, 64, 8, 3))) == "TileWarning: too large"


def test_what_cannot_run_or_is_wrong_is_left_out_and_without_the_rest_the_default_stays(monkeypatch, a_gpu):
    """Forward: one candidate does not compile, the others are timed. Decode: none compiles. dK, dU, dV: all wrong."""
    first = tune.candidates("forward", "half")[0]

    def fails(job):
        kernel, _, _, tile = job
        return "PTXASError: bad" if kernel == "decode" or (kernel, tile) == ("forward", first) else None

    def results(kernel, *_):
        wrong = kernel == "backward_weights" and a_gpu[name_of(kernel)] != tuning.default(kernel, 128, "half")
        return [torch.zeros(4) if wrong else torch.ones(4)]

    def name_of(kernel):
        return tuning.key(kernel, "sm_00", 128, "half")

    pool = nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(tune.concurrent.futures, "ProcessPoolExecutor", lambda *_, **__: pool)
    monkeypatch.setattr(tune, "_compile", fails)
    monkeypatch.setattr(tune, "_call", results)
    monkeypatch.setattr(tune, "_milliseconds", lambda kernel, *_: a_gpu[name_of(kernel)].block_n)
    lines: list[str] = []
    rows = tune.tune([128], ["half"], lines.append)
    assert rows == a_gpu
    assert rows[name_of("forward")] == tuning.Tile(128, 32, 8, 2, programs_per_sm=1)
    for kernel in ("decode", "backward_weights"):
        assert rows[name_of(kernel)] == tuning.default(kernel, 128, "half")
        assert f"  {name_of(kernel)}: every candidate is left out, so the default tile stays" in lines
    assert f"  {NAME} {first}: cannot run, left out: PTXASError: bad" in lines
    wrong = len(tune.candidates("backward_weights", "half"))
    assert sum("results differ by 1.0e+00, left out" in line for line in lines) == wrong


def _join(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )


def _receive(rank: int, folder: str) -> None:
    _join(rank, folder)

    def measured(d_hs, dtypes, log):
        assert rank == 0, "only rank 0 measures"
        assert (list(d_hs), list(dtypes)) == ([96], ["half"])
        return {NAME: tuning.Tile(32, 16, 2, 1)}

    tune.tune = measured
    tune.tune_on_one_rank(96, torch.bfloat16, log=print)
    Path(folder, f"rank{rank}").write_text(str(tuning.lookup("forward", "sm_00", 128, "half")))
    dist.destroy_process_group()


def test_one_rank_tunes_and_the_other_receives(tmp_path):
    mp.spawn(_receive, args=(str(tmp_path),), nprocs=2)
    expected = str((tuning.Tile(32, 16, 2, 1), "tuned"))
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [expected] * 2


def _fail(rank: int, folder: str) -> None:
    _join(rank, folder)

    def fails(*_):
        raise MemoryError("none left")

    tune.tune = fails
    try:
        tune.tune_on_one_rank(96, torch.bfloat16, log=print)
    except RuntimeError as error:
        Path(folder, f"rank{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_a_failure_of_the_rank_that_tunes_is_raised_on_all(tmp_path):
    mp.spawn(_fail, args=(str(tmp_path),), nprocs=2)
    expected = "rank 0 could not tune the kernels (MemoryError: none left); without tuning, the shipped tiles run"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [expected] * 2
