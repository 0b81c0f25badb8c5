"""The tuning table, and that one rank tunes for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mhf_kernels import tune, tuning

NAME = tuning.key("forward", "sm_00", 128, "half")


def test_rows_round_trip_through_a_table_file(tmp_path):
    rows = {NAME: tuning.Tile(128, 64, 8, 3, 1), tuning.key("decode", "sm_00", 64, "half"): tuning.Tile(16, 32, 4, 2)}
    path = tmp_path / "table.json"
    path.write_text(tuning.dump(rows, {"sm_00": "a GPU"}))
    assert tuning.read(path) == rows
    assert tuning.read(tmp_path / "missing.json") == {}


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


def _receive(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

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
