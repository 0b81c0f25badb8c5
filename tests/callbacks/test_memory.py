"""Peak memory by phase and over ranks, and what is said where memory runs out. The GPU's side is in tests/gpu."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from timed_run import CONFIG, train

from mhf_lightning.callbacks import memory
from mhf_lightning.callbacks.memory import GIB, PHASES, PeakMemory, over_ranks, settings_to_try
from mhf_lightning.model import FFNConfig
from mhf_lightning.training.module import PretrainModule


class Allocator:
    """The counters of CUDA's caching allocator."""

    def __init__(self) -> None:
        self.now = self.peak = self.reserved = 0

    def allocate(self, gib: float) -> None:
        self.now += int(gib * GIB)
        self.peak, self.reserved = max(self.peak, self.now), max(self.reserved, self.now + GIB)

    def stats(self, device: object) -> dict:
        return {
            "allocated_bytes": {"all": {"peak": self.peak}},
            "reserved_bytes": {"all": {"peak": self.reserved, "current": self.reserved}},
            "inactive_split_bytes": {"all": {"current": self.reserved // 4}},
            "num_alloc_retries": 2,
            "num_ooms": 1,
        }

    def reset(self, device: object) -> None:
        self.peak = self.now


@pytest.fixture
def allocator(monkeypatch):
    fake = Allocator()
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", fake.stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fake.reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: fake.peak)
    monkeypatch.setattr(memory, "_reset_peaks", {})
    return fake


def test_the_peak_of_each_phase_window_and_run(allocator, monkeypatch):
    device = torch.device("cuda", 0)
    module = SimpleNamespace(device=device)
    points: list[dict] = []
    monkeypatch.setattr(memory, "is_logging_step", lambda trainer: True)
    monkeypatch.setattr(memory, "point_step", lambda trainer: 0)
    monkeypatch.setattr(memory, "write_points", lambda trainer, values, step: points.append(values))
    meter = PeakMemory()
    meter.on_train_start(None, module)

    def batch(forward: float, backward: float, optimizer: float) -> None:
        hooks = [meter.on_train_batch_start, meter.on_before_backward, meter.on_after_backward]
        for hook, peak in zip(hooks, (forward, backward, 0), strict=True):
            hook(None, module)
            allocator.allocate(peak)
            allocator.allocate(-peak)
        meter.on_before_optimizer_step(None, module)
        allocator.allocate(optimizer)
        allocator.allocate(-optimizer)
        meter.on_train_batch_end(None, module)

    allocator.allocate(1)  # weights
    batch(2, 5, 3)
    assert not points
    meter.on_validation_start(None, module)
    allocator.allocate(4)
    allocator.allocate(-4)
    meter.on_validation_end(None, module)
    batch(1, 2, 1)
    meter.on_train_end(None, module)
    assert points[0]["memory/peak_in_forward_gib"] == 3
    assert points[0]["memory/peak_in_backward_gib"] == 6
    assert points[0]["memory/peak_in_optimizer_gib"] == 4
    assert "memory/peak_in_validation_gib" not in points[0]
    assert points[0]["memory/peak_allocated_gib"] == points[0]["memory/peak_gib"] == 6
    assert points[0]["memory/peak_reserved_gib"] == 7
    assert points[0]["memory/peak_reserved_min_gib"] == points[0]["memory/peak_reserved_max_gib"] == 7
    assert points[0]["memory/fragmentation"] == 0.25
    assert (points[0]["memory/alloc_retries"], points[0]["memory/ooms"]) == (2, 1)

    assert points[1]["memory/peak_in_validation_gib"] == points[1]["memory/peak_max_gib"] == 5
    assert points[1]["memory/peak_in_backward_gib"] == 3
    assert points[1]["memory/peak_gib"] == 6  # of the run
    assert memory.peak_memory_gib(device) == 6


def test_which_rank_has_the_peak():
    columns = {"peak": [2.0, 7.0, 3.0], "run": [8.0, 7.0, 9.0], "host": [1.0, 1.0, 4.0]}
    assert over_ranks({key: torch.tensor(value).double() for key, value in columns.items()}) == {
        "memory/peak_gib": 9,
        "memory/peak_min_gib": 2,
        "memory/peak_mean_gib": 4,
        "memory/peak_max_gib": 7,
        "memory/peak_rank": 1,
        "memory/host_rss_gib": 4,
    }


def test_reserved_memory_of_the_ranks():
    """The rank with the highest peak is not the one that has reserved the most."""
    columns = {key: torch.zeros(3, dtype=torch.float64) for key in ("run", "host", "split", "retries", "ooms", *PHASES)}
    columns |= {"peak": torch.tensor([2.0, 7.0, 3.0]), "reserved": torch.tensor([4.0, 8.0, 9.0])}
    values = over_ranks(columns)
    found = [values[f"memory/peak_reserved{of}_gib"] for of in ("", "_min", "_mean", "_max")]
    assert found == [8, 4, 7, 9]


PEAK_AFTER_EXEC = """
import os, sys
held = b"x" * (3 * 2**29)
code = "import torch; from mhf_lightning.callbacks.memory import peak_memory_gib as p; print(p(torch.device('cpu')))"
os.execv(sys.executable, [sys.executable, "-c", code])
"""


@pytest.mark.slow
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    done = subprocess.run([sys.executable, "-c", PEAK_AFTER_EXEC], capture_output=True, text=True, check=True)
    assert 0.1 < float(done.stdout) < 1.5


def test_the_resident_set_is_that_of_this_process():
    before = memory.resident_gib()
    held = torch.ones(2**26)  # 256 MiB
    assert memory.resident_gib() - before == pytest.approx(0.25, abs=0.02)
    assert memory.peak_memory_gib(torch.device("cpu")) > memory.resident_gib() - 0.01  # counters lag
    del held


class OutOfMemory(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_says_what_to_try(monkeypatch, capsys):
    monkeypatch.setattr("timed_run.callbacks_of", lambda case: [OutOfMemory(), PeakMemory()])
    with pytest.raises(torch.OutOfMemoryError):
        train({"strategy": "single", "rows": [[4] * 4], "steps": 4})
    said = capsys.readouterr().err
    assert "mhf: out of memory (rank 0, forward): " in said
    for part in ("weights 0.00 GiB", "gradients", "optimiser state"):
        assert part in said
    assert "data.micro_batch_size 2 with trainer.accumulate_grad_batches 2" in said
    assert "model.activation_checkpointing selective; or model.decoder.ffn.recompute_queries true" in said


def test_settings_keep_the_global_batch_and_leave_out_what_is_set():
    trainer = SimpleNamespace(datamodule=SimpleNamespace(micro_batch_size=9), accumulate_grad_batches=2)
    module = PretrainModule(CONFIG, activation_checkpointing="full")
    settings = settings_to_try(trainer, module)
    assert settings[0] == "data.micro_batch_size 3 with trainer.accumulate_grad_batches 6"
    assert settings[1] == "model.decoder.ffn.recompute_queries true"
    assert len(settings) == 3
    trainer.datamodule.micro_batch_size = 1
    assert "fsdp2" in settings_to_try(trainer, module)[1]


@pytest.mark.parametrize(
    ("ffn", "mode", "advice"),
    [
        (CONFIG.ffn, "none", "selective"),
        (CONFIG.ffn, "selective", "ffn"),
        (CONFIG.ffn, "ffn", "full"),
        (FFNConfig("swiglu", d_ff=48), "selective", "full"),
    ],
)
def test_the_next_mode_of_checkpointing_keeps_less(ffn, mode, advice):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(micro_batch_size=1), accumulate_grad_batches=1)
    module = PretrainModule(dataclasses.replace(CONFIG, ffn=ffn), activation_checkpointing=mode)
    assert settings_to_try(trainer, module)[0] == f"model.activation_checkpointing {advice}"
