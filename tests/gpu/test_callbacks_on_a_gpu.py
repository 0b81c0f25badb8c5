"""The callbacks on a CUDA device: what they cost the 370M model, that they do not wait, and what they measure."""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from mhf_lightning.callbacks import MonitorConfig, is_logging_step
from mhf_lightning.callbacks.layout import Layout
from mhf_lightning.callbacks.memory import PeakMemory
from mhf_lightning.callbacks.model_health import ModelHealth
from mhf_lightning.callbacks.router_health import RouterHealth
from mhf_lightning.callbacks.run_text import RunText
from mhf_lightning.callbacks.throughput import PHASES, Throughput
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import ScheduleConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
SMALL = DecoderConfig(
    vocab_size=512, d_model=256, num_layers=2, ffn=FFNConfig("flash_mhf", num_heads=4, num_subnetworks=3, d_e=64)
)


class Tokens(Dataset):
    """Random sequences, drawn beforehand."""

    def __init__(self, n: int, length: int, vocab_size: int) -> None:
        self.tokens = torch.randint(vocab_size, (min(n, 256), length + 1), generator=torch.Generator().manual_seed(0))
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.tokens[i % len(self.tokens)]
        return {"input_ids": row[:-1], "labels": row[1:], "sample_index": torch.tensor(i)}


class Data(LightningDataModule):
    """Batches of them."""

    def __init__(self, steps: int, micro_batch_size: int, length: int, vocab_size: int) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.dataset = Tokens(steps * micro_batch_size, length, vocab_size)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.micro_batch_size, pin_memory=True, num_workers=2)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.micro_batch_size)


class Stopwatch(Callback):
    """Time of the steps after the first ``skip``, the device waited for at both ends."""

    def __init__(self, skip: int) -> None:
        self.skip, self.begun, self.seconds = skip, 0.0, 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in (self.skip, trainer.max_steps):
            torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds, self.begun = now - self.begun, now


def fit(config: DecoderConfig, folder: Path, steps: int, callbacks: list[Callback], **options: Any) -> Trainer:
    seed_everything(1)
    shape = options.pop("shape", (8, 256))
    module = PretrainModule(
        config, schedule=ScheduleConfig(warmup_steps=2), compile_blocks=options.pop("compile", False)
    )
    trainer = Trainer(
        **{"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "max_steps": steps, "max_epochs": -1},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        **{"limit_val_batches": 0, "log_every_n_steps": 10, "use_distributed_sampler": False, **options},
        strategy=MHFSingleDevice(torch.device("cuda", 0)),
        logger=TensorBoardLogger(str(folder), name="", version=""),
        callbacks=callbacks,
    )
    trainer.fit(module, Data(steps, *shape, config.vocab_size))
    return trainer


def ours(folder: Path) -> list[Callback]:
    """All of them, with default settings."""
    monitor = MonitorConfig()
    first = [Throughput(monitor.peak_tflops), PeakMemory(folder), ModelHealth()]
    return [*first, RouterHealth(monitor.router_every_n_steps), Layout(), RunText("run_dir: runs/run")]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


TURNS = 4
SKIPPED, TIMED = 10, 40  # steps


class TimedLooks(RouterHealth):
    """Times the looks at the routers, the device waited for at both ends."""

    seconds = 0.0  # of the last one

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step < self._next or not is_logging_step(trainer):
            return
        torch.cuda.synchronize()
        begun = time.perf_counter()
        super().on_train_batch_end(trainer, *args)
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - begun


def test_overhead_with_the_370m_model_is_below_one_percent(tmp_path):
    """Fits without and with callbacks, the order swapped from turn to turn (ABBA), and the medians of both compared.

    The timed steps hold four logging steps, as any 40 do, and one look at the routers, which counts as often as one
    comes at default settings. The figures also go to the file that ``MHF_OVERHEAD_FILE`` names.
    """
    raw = yaml.safe_load((ROOT / "configs/paper/370m/flash_mhf_dh128.yaml").read_text())["model"]["decoder"]
    config = DecoderConfig(**{**raw, "ffn": FFNConfig(**raw["ffn"])})
    turns: dict[str, list[float]] = {"alone": [], "with callbacks": [], "look at the routers": []}
    for turn in range(TURNS):
        for watched in (False, True) if turn % 2 == 0 else (True, False):
            folder, watch, looks = tmp_path / f"{turn}-{watched}", Stopwatch(SKIPPED), TimedLooks(TIMED)
            others = [callback for callback in ours(folder) if not isinstance(callback, RouterHealth)]
            callbacks = [*others, looks, watch] if watched else [watch]
            fit(config, folder, SKIPPED + TIMED, callbacks, shape=(8, 2048), compile=True)
            turns["with callbacks" if watched else "alone"].append((watch.seconds - looks.seconds) / TIMED)
            turns["look at the routers"] += [looks.seconds] if watched else []
    alone, with_them, look = (statistics.median(seconds) for seconds in turns.values())
    with_them += look / MonitorConfig().router_every_n_steps
    overhead = with_them / alone - 1
    line = f"370M: {1e3 * alone:.2f} ms a step alone, {1e3 * with_them:.2f} ms with all callbacks: {overhead:+.2%}"
    print(line)
    if "MHF_OVERHEAD_FILE" in os.environ:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "summary": line}
        Path(os.environ["MHF_OVERHEAD_FILE"]).write_text(json.dumps({**about, "seconds": turns}, indent=1) + "\n")
    assert overhead < 0.01


def test_no_step_waits_for_the_device_because_of_them(tmp_path):
    """PyTorch warns of each synchronising call; steps that log nothing have none more than without callbacks."""

    class Syncs(Callback):
        def __init__(self) -> None:
            self.by_step: list[int] = []
            self.caught: Any = None

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if self.caught is not None:
                self.by_step.append(len(self.caught))
                self.caught.clear()

    def count(callbacks: list[Callback], folder: Path) -> list[int]:
        syncs = Syncs()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            syncs.caught = caught
            torch.cuda.set_sync_debug_mode("warn")
            try:
                fit(SMALL, folder, 18, [*callbacks, syncs])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return syncs.by_step

    alone = count([], tmp_path / "alone")
    watched = count(ours(tmp_path / "watched"), tmp_path / "watched")
    assert min(alone[12:17]) > 0  # the training module's own, one a step: warnings are caught
    assert alone[12:17] == watched[12:17]


def test_rates_shares_and_peaks(tmp_path):
    watch = Stopwatch(10)
    fit(SMALL, tmp_path, 60, [*ours(tmp_path), watch], shape=(16, 1024), limit_val_batches=2, val_check_interval=25)
    found = scalars(tmp_path)
    rate = found["throughput/tokens_per_s"]
    no_validation = [step for step in rate if step > 10 and not found["time/validation"][step]]
    assert len(no_validation) >= 2
    for step, value in rate.items():
        assert sum(found[f"time/{phase}"][step] for phase in PHASES) == pytest.approx(1, abs=1e-5)
        assert value > 0
    # The stopwatch sees validation too, the meter leaves it out.
    assert statistics.mean(rate.values()) > 50 * 16 * 1024 / watch.seconds * 0.95
    for step in rate:
        peaks = {phase: found[f"memory/peak_in_{phase}_gib"][step] for phase in ("forward", "backward", "optimizer")}
        assert max(peaks.values()) <= found["memory/peak_max_gib"][step] <= found["memory/peak_gib"][step]
        assert found["memory/peak_reserved_gib"][step] >= found["memory/peak_allocated_gib"][step]
        assert 0 <= found["memory/fragmentation"][step] < 1
    name = torch.cuda.get_device_name()
    if "H200" in name or "H100 80GB" in name:
        assert 0 < found["throughput/mfu"][59] < 1


def test_out_of_memory_leaves_a_snapshot_and_advice(tmp_path, capsys):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fit(SMALL, tmp_path, 3, ours(tmp_path), shape=(4096, 1024))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    said = capsys.readouterr().err
    assert "mhf: out of memory (rank 0, forward): activations and the rest" in said
    assert "data.micro_batch_size 2048 with trainer.accumulate_grad_batches 2" in said
    assert (tmp_path / "out-of-memory-rank-0.pickle").stat().st_size > 1000
