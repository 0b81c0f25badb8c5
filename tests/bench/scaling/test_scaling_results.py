"""Rows of what cases have returned: differences, efficiency, MFU, checkpoints."""

from dataclasses import replace

import pytest
import torch
from tiny_cases import outcome_of, run, sizes

from mhf_lightning.bench.scaling import cases, results
from mhf_lightning.bench.scaling.processes import Outcome

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks would take the GPUs")


@pytest.mark.parametrize(
    ("planted", "status"),
    [
        ({}, "ok"),
        ({3: (2.0 * (1 + 4e-4), 1.0)}, "differs"),
        ({3: (2.0, 1.0 - 4e-3)}, "differs"),
        ({3: (2.0, float("nan"))}, "differs"),
    ],
)
def test_one_step_that_differs_is_found(planted, status, model):
    case = sizes(model).case("parity", model, "ddp", 2)
    reference = dict.fromkeys(range(1, 6), (2.0, 1.0))
    row = results.parity_row(case, outcome_of(reference | planted), reference)
    assert row["status"] == status
    assert row["median_loss_difference"] == 0
    with pytest.raises(ValueError, match="not those of the reference"):
        results.differences(reference, {9: (2.0, 1.0)})


def test_other_data_are_found_out(model, tmp_path):
    """Half a micro-batch on each rank is the same step; a whole one is not."""
    one = sizes(model).case("parity", model, "single", 1)
    two = replace(one, strategy="ddp", gpus=2)
    ended = run(tmp_path, one, replace(two, micro_batch=1), replace(two, stage="planted"))
    assert [outcome.status for outcome in ended.values()] == ["ok"] * 3
    reference, half, whole = ended.values()
    curve = results.curve(reference)
    assert results.parity_row(two, half, curve)["status"] == "ok"
    assert results.parity_row(two, whole, curve)["status"] == "differs"


def test_efficiency_and_mfu_of_known_times(model):
    """4 steps of 8 sequences of 16 tokens in 2 s, on 2 GPUs of 1000 FLOP/s, 2 FLOPs a token."""
    case = sizes(model).case("weak", model, "ddp", 2)
    case = replace(case, micro_batch=4, warmup=1)
    ended = outcome_of(dict.fromkeys(range(1, 6), (2.0, 1.0)))
    ended.events[0][-1]["done"]["reserved_bytes"] = 2**31
    ended.events[0].insert(0, {"started": True, "time": 0.0})
    row = results.scaling_row(case, ended, 2.0, {"tokens_per_s_per_gpu": 160.0})
    expected = {"tokens_per_s": 256.0, "tokens_per_s_per_gpu": 128.0, "efficiency": 0.8, "mfu": 0.256, "step_ms": 500.0}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert {name: row[name] for name in ("peak_gib", "reserved_gib", "start_s", "slowest_step_ms")} == pytest.approx(
        {"peak_gib": 1.0, "reserved_gib": 2.0, "start_s": 1.0, "slowest_step_ms": 800.0}
    )


def test_the_newest_checkpoint_is_measured_also_when_disks_are_slow(model, tmp_path):
    """Of two saves in the background the second had to wait for the first, from step 14 to step 30."""
    ((killed,), (goes_on,)) = cases.checkpoint(sizes(model))
    assert [step for step, _ in killed.save_at] == [11, 14, 17]
    steps = [
        {"step": step, "at": float(step), "time": float(step), "loss": 2.0, "grad_norm": 1.0} for step in range(1, 50)
    ]
    steps[5]["at"] = 5.2  # when it was launched
    saves = [(11, 1.0, 12.0), (14, 0.5, 29.0), (30, 0.25, 40.0)]
    events = [{"saved": step, "stall_s": stall, "time": step + stall} for step, stall, _ in saves]
    events += [{"committed": step, "time": on_disk} for step, _, on_disk in saves]
    died = Outcome("failed: rank 1 died (signal 9)", [[*steps, *events], [{"killed": 43, "time": 43.0}]], 44.0, 43.5)
    again = [{"started": True, "time": 45.0}, {"training": 30, "time": 46.0}]
    again += [step | {"at": 20.0 + step["at"]} for step in steps[30:33]]
    resumed = Outcome("ok", [[*again, {"done": {"parameters": 10}}]], 8.0, 52.0)
    (tmp_path / "step-30/rank0").mkdir(parents=True)
    (tmp_path / "step-30/rank0/shard").write_bytes(bytes(2**20))
    row = results.checkpoint_row((killed, died), resumed, tmp_path)
    assert row["status"] == "ok"
    expected = {"checkpoint_gib": 2**-10, "gib_per_s": 2**-10, "stall_s": 1.0, "background_stall_s": 0.5}
    expected |= {"later_background_stall_s": 0.25, "background_s": 15.0, "saved_step": 30, "recovery_s": 8.0}
    expected |= {"step_ms": 1000.0, "background_step_ms": 1000.0}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert goes_on.stop_after == 3
