"""The callbacks on a CUDA device: what they cost the 370M model, that they do not wait, and what they measure."""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from step_costs import costs, interval, is_on, kinds_of_steps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from mhf_lightning.callbacks import MonitorConfig
from mhf_lightning.callbacks.layout import Layout
from mhf_lightning.callbacks.memory import PeakMemory
from mhf_lightning.callbacks.model_health import ModelHealth
from mhf_lightning.callbacks.router_health import RouterHealth
from mhf_lightning.callbacks.run_text import RunText
from mhf_lightning.callbacks.throughput import PHASES, Throughput
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.training.cli import TRAINER_DEFAULTS
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import ScheduleConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
LOG_EVERY = 10
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
    module = options.pop("kind", PretrainModule)(
        config, schedule=ScheduleConfig(warmup_steps=2), compile_blocks=options.pop("compile", False)
    )
    trainer = Trainer(
        **{"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "max_steps": steps, "max_epochs": -1},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        **{"limit_val_batches": 0, "log_every_n_steps": LOG_EVERY, "use_distributed_sampler": False, **options},
        strategy=MHFSingleDevice(torch.device("cuda", 0)),
        logger=TensorBoardLogger(str(folder), name="", version="", max_queue=1000),  # as `mhf fit` makes it
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


EVERY = 5  # steps between two at which Lightning logs, where the overhead is measured
LOOK_EVERY = 100  # half of these steps are with callbacks: enough for the pictures, and as many without
WARM_UP = 45  # the first look too
HOOKS = [name for name in dir(Callback) if name.startswith("on_") and name != "on_exception"]
ALWAYS = ("on_fit_start", "on_train_start", "on_train_end")


class Switched(Callback):
    """Passes hooks on to callbacks in some turns of ``EVERY`` steps only."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks
        self.marks: list[tuple[bool, torch.cuda.Event]] = []  # at the end of each step, after the callbacks
        for hook in HOOKS:
            setattr(self, hook, partial(self._pass_on, hook))

    def _pass_on(self, hook: str, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        ends = hook == "on_train_batch_end"
        on = is_on(step - 1 if ends else step, EVERY)
        if on or hook in ALWAYS:
            for callback in self.callbacks:
                getattr(callback, hook)(trainer, *args, **kwargs)
        if ends:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((on, event))


def test_overhead_with_the_370m_model_is_below_one_percent(tmp_path):
    """One fit in which the callbacks are on and off in turns; ``step_costs.py`` says what is compared.

    Steps are logged, and looks at the routers taken, more often than at default settings, and count as often as at
    those. Without callbacks Lightning logs all the same. The figures go to the file that ``MHF_OVERHEAD_FILE`` names.
    """
    raw = yaml.safe_load((ROOT / "configs/paper/370m/flash_mhf_dh128.yaml").read_text())["model"]["decoder"]
    config = DecoderConfig(**{**raw, "ffn": FFNConfig(**raw["ffn"])})
    looks = RouterHealth(LOOK_EVERY)
    watch = Switched([looks if isinstance(callback, RouterHealth) else callback for callback in ours(tmp_path)])
    fit(config, tmp_path, 420, [watch], shape=(8, 2048), compile=True, log_every_n_steps=EVERY)
    torch.cuda.synchronize()
    looked_at = {step + 1 for step in scalars(tmp_path)["router/entropy_token/mean"]}
    kinds = kinds_of_steps([on for on, _ in watch.marks], looked_at, EVERY, config.num_layers)
    times: dict[str, list[float]] = defaultdict(list)
    for step in range(WARM_UP, len(kinds)):  # and the next, from 0
        times[kinds[step]].append(watch.marks[step - 1][1].elapsed_time(watch.marks[step][1]))
    log_every, look_every = TRAINER_DEFAULTS["log_every_n_steps"], MonitorConfig().router_every_n_steps
    cost = costs(times, log_every, look_every, config.num_layers)
    low, high = interval(times, log_every, look_every, config.num_layers)
    line = (
        f"370M: {cost.alone:.2f} ms a step alone; the callbacks add {cost.ordinary:.2f} ms to one that logs nothing, "
        f"{cost.logging:.1f} ms to one that logs, {cost.look:.0f} ms to a look at the routers: {cost.overhead:+.2%}, "
        f"{low:+.2%} to {high:+.2%}"
    )
    print(line)
    if "MHF_OVERHEAD_FILE" in os.environ:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "summary": line}
        Path(os.environ["MHF_OVERHEAD_FILE"]).write_text(json.dumps({**about, "ms": times}, indent=1) + "\n")
    assert cost.overhead < 0.01


def test_no_step_waits_for_the_device_because_of_them(tmp_path):
    """PyTorch warns of each synchronising call; only those that log have some, as without callbacks.

    The steps compared are ordinary ones, one that logs and looks at the routers, and the one after it, in which the
    points are written. Events, which the training module and the deferred work wait for, are not counted: they lie
    behind the device's queue by a step.
    """

    class Syncs(Callback):
        def __init__(self, caught: list[warnings.WarningMessage]) -> None:
            self.caught = caught
            self.by_step: list[int] = []  # by `trainer.global_step` after the step; the first are those before training

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.by_step.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in self.caught))
            self.caught.clear()

    def count(callbacks: list[Callback], folder: Path) -> list[int]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            syncs = Syncs(caught)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                fit(SMALL, folder, 18, [*callbacks, syncs])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return syncs.by_step

    alone = count([], tmp_path / "alone")
    watched = count(ours(tmp_path / "watched"), tmp_path / "watched")
    steps = range(LOG_EVERY - 2, LOG_EVERY + 7)
    assert [step for step in steps if alone[step]] == [LOG_EVERY]
    assert [alone[step] for step in steps] == [watched[step] for step in steps]


def test_a_step_that_is_left_out_changes_nothing_and_is_counted_later(tmp_path):
    class Poisoned(PretrainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step in (0, 2, 3):
                loss.register_hook(lambda grad: grad * float("nan"))
            return loss

    class Watch(Callback):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []
            self.counted: list[int] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: PretrainModule, *_: Any) -> None:
            self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.decoder.parameters()]))

        def on_train_batch_end(self, trainer: Trainer, pl_module: PretrainModule, *_: Any) -> None:
            self.counted.append(pl_module.skipped_steps)

    watch = Watch()
    trainer = fit(SMALL, tmp_path, 6, [*ours(tmp_path), watch], kind=Poisoned, log_every_n_steps=1)
    unchanged = [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert unchanged == [True, False, True, True, False]
    assert all(state["step"] == 3 for state in trainer.optimizers[0].state.values())
    assert watch.counted == [0, 1, 1, 2, 3, 3]
    found = scalars(tmp_path)
    assert list(found["train/skipped_steps"].values()) == [1, 1, 2, 3, 3, 3]
    assert sorted(found["health/update_to_weight"]) == [1, 4, 5]


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
