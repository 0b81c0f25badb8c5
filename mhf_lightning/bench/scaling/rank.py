"""One rank of a case: the Trainer, the module and a strategy of `mhf fit`, on made-up tokens. Imports Lightning."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mhf_lightning.bench.model import read_model
from mhf_lightning.bench.scaling.cases import SEED, Case
from mhf_lightning.bench.scaling.processes import Lines
from mhf_lightning.callbacks.garbage import FrozenGarbage
from mhf_lightning.callbacks.preemption import drop_sigterm_broadcast
from mhf_lightning.callbacks.throughput import DEVICES
from mhf_lightning.checkpoint import find_newest_valid
from mhf_lightning.checkpoint.shards import SaveOptions
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.data.sampler import GlobalOrderSampler
from mhf_lightning.model.loss import IGNORE_INDEX
from mhf_lightning.plan.gpus import GPUS
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig
from mhf_lightning.training.ranks import data_parallel_ranks
from mhf_lightning.training.strategies import MHFDDP, MHFFSDP2, MHFDeepSpeed

STEPS_AFTER_SAVE = 3
STREAM, STRIDE = 2**20, 104_729  # tokens that samples are cut from; a prime, so that they begin anywhere


def train(order: dict[str, Any], lines: Lines) -> dict[str, Any]:
    """Run the case of an order; returns what is to be known of it beside the steps."""
    torch.set_num_threads(order["threads"])
    warnings.filterwarnings("ignore")
    values = order["case"]
    case = Case(**{**values, "save_at": tuple((step, background) for step, background in values["save_at"])})
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    seed_everything(SEED, verbose=False)
    config = read_model(Path(case.model))
    if case.layers is not None:
        config = dataclasses.replace(config, num_layers=min(case.layers, config.num_layers))
    with device:  # drawing 1.3B weights on a few cores takes longer than the steps
        module = PretrainModule(
            config,
            # With an epsilon near zero, Adam turns the rounding of gradients near zero into steps of full size.
            OptimizerConfig(lr=case.lr, eps=1e-5),
            ScheduleConfig(warmup_steps=min(10, case.steps)),
            compile_blocks=case.compiled,
        )
    parameters = sum(parameter.numel() for parameter in module.parameters())  # while they are whole
    meter = Meter(case, Path(order["folder"]) / "checkpoints", lines)
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=case.gpus,
        strategy=STRATEGIES[case.strategy](case, device),
        precision=case.precision,  # type: ignore[arg-type] # a string of a row
        max_steps=case.steps,
        accumulate_grad_batches=case.accumulate,
        callbacks=[FrozenGarbage(), meter],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    resume = None
    if case.resume is not None:
        resume, skipped = find_newest_valid(order["checkpoints"], verify_files=int(os.environ["RANK"]) == 0)
        if resume is None or skipped:
            raise RuntimeError(f"{case.resume} left no whole checkpoint: {'; '.join(skipped) or 'none at all'}")
    trainer.fit(module, SyntheticTokens(config.vocab_size, case.length, case.micro_batch), ckpt_path=resume)
    result: dict[str, Any] = {"durations_s": meter.durations_s()}
    result |= {"parameters": parameters, "num_layers": config.num_layers}
    if on_gpu:
        name = torch.cuda.get_device_name(device)
        result["peak_flops"] = GPUS[DEVICES[name]].bf16_flops if name in DEVICES else None
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        result["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return result


STRATEGIES: dict[str, Callable[[Case, torch.device], Any]] = {
    "single": lambda case, device: MHFSingleDevice(device),
    "ddp": lambda case, device: MHFDDP(),
    "fsdp2": lambda case, device: MHFFSDP2(case.data_parallel),
    "fsdp2_tp": lambda case, device: MHFFSDP2(case.data_parallel, case.tensor_parallel),
    "zero2": lambda case, device: MHFDeepSpeed(2),
    "zero3": lambda case, device: MHFDeepSpeed(3),
}


class LogUniform(Dataset[dict[str, Tensor]]):
    """Tokens whose frequency falls with their number, as words' does: there is something to learn in 50 steps.

    A sample is a function of its index. Up to three eighths of its positions have no target, so that ranks differ in
    the number of targets, which only a mean over all of them takes into account.
    """

    def __init__(self, vocab_size: int, length: int, samples: int) -> None:
        self.length, self.samples = length, samples
        uniform = torch.rand(STREAM + length + 1, generator=torch.Generator().manual_seed(SEED))
        self.stream = (uniform * math.log(vocab_size)).exp().long().clamp_max(vocab_size) - 1

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = index * STRIDE % STREAM
        tokens = self.stream[first : first + self.length + 1]
        labels = tokens[1:].clone()
        labels[: self.length * (index % 4) // 8] = IGNORE_INDEX
        return {"input_ids": tokens[:-1], "labels": labels, "sample_index": torch.tensor(index)}


class SyntheticTokens(LightningDataModule):
    """Deals `LogUniform` as `TokenDataModule` deals a dataset: the order does not depend on the number of ranks."""

    def __init__(self, vocab_size: int, length: int, micro_batch_size: int) -> None:
        super().__init__()
        self.vocab_size, self.length, self.micro_batch_size = vocab_size, length, micro_batch_size
        self.consumed_samples = 0

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The batches of this rank."""
        trainer = self.trainer
        assert trainer is not None
        rank, ranks = data_parallel_ranks(trainer)
        total = trainer.max_steps * trainer.accumulate_grad_batches * ranks * self.micro_batch_size
        sampler = GlobalOrderSampler(
            total, total, SEED, self.consumed_samples, rank, ranks, micro_batch_size=self.micro_batch_size
        )
        tokens = LogUniform(self.vocab_size, self.length, total)
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return DataLoader(tokens, batch_sampler=sampler, pin_memory=on_gpu)

    def state_dict(self) -> dict[str, Any]:
        """The data cursor."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there."""
        self.consumed_samples = state_dict["consumed_samples"]


class Meter(Checkpoint):
    """Times steps, keeps their losses, saves where the case says so, and kills its process where the case says that.

    It is a `Checkpoint` because Lightning calls those last, when the data cursor has been advanced.
    """

    def __init__(self, case: Case, folder: Path, lines: Lines) -> None:
        self.case, self.folder, self.lines = case, folder, lines
        self._marks: list[Any] = []  # when each measured step ended, after when the first began
        self._kept: list[dict[str, Any]] = []  # steps that are not written yet
        self._due = list(case.save_at)
        self._saved = self._committed = 0  # steps of the last save that was begun, and of that which is on disk

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Say that everything is loaded."""
        drop_sigterm_broadcast(trainer)  # as in `mhf fit`
        self._last_step = trainer.global_step
        self._first_step = trainer.global_step
        strategy: Any = trainer.strategy
        strategy.on_commit = self._on_commit
        self.lines.write(training=trainer.global_step)

    def _on_commit(self, step: int) -> None:
        self._committed = step
        self.lines.write(committed=step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Count a step, if this was its last micro-batch."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step == self._first_step + self.case.warmup:
            _wait(trainer)
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if step >= self._first_step + self.case.warmup:
            self._mark(trainer)
        if step == self.case.steps:
            _wait(trainer)
        norm = trainer.callback_metrics["train/grad_norm"]
        self._kept.append({"step": step, "at": time.time(), "loss": pl_module.step_loss, "grad_norm": norm})
        # Reading a loss waits for the device. A training that will be killed has to write its losses before.
        if self.case.kill or step in (self.case.steps, self._first_step + 1):
            self._write()
        if self._due and step >= self._due[0][0] and self._is_on_disk(trainer):
            self._save(trainer, step, background=self._due.pop(0)[1])
        elif self.case.kill and not self._due and step >= self._saved + STEPS_AFTER_SAVE and self._is_on_disk(trainer):
            self._die(trainer)
        if self.case.stop_after is not None and step == self._first_step + self.case.stop_after:
            self._write()
            trainer.should_stop = True

    def _mark(self, trainer: Trainer) -> None:
        """Take the time at which the device is done with what was queued: the host runs ahead of it."""
        if trainer.strategy.root_device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def durations_s(self) -> list[float]:
        """Return the time of each measured step, in seconds; the device has ended all of them."""
        pairs = itertools.pairwise(self._marks)
        if self._marks and not isinstance(self._marks[0], float):
            return [sooner.elapsed_time(later) / 1e3 for sooner, later in pairs]
        return [later - sooner for sooner, later in pairs]

    def _write(self) -> None:
        for values in self._kept:
            self.lines.write(**{key: float(value) if key != "step" else value for key, value in values.items()})
        self._kept.clear()

    def _is_on_disk(self, trainer: Trainer) -> bool:
        """Say whether the last save is, for every rank: they have to agree, and hear of it at different times."""
        return trainer.strategy.reduce_boolean_decision(self._committed == self._saved)

    def _save(self, trainer: Trainer, step: int, background: bool) -> None:
        """Save, and say for how long training stood still."""
        _wait(trainer)
        begun = time.perf_counter()
        options = SaveOptions(background=background)
        self._saved = step
        trainer.save_checkpoint(self.folder / f"step-{step}", weights_only=False, storage_options=options)
        _wait(trainer)
        self.lines.write(saved=step, background=background, stall_s=time.perf_counter() - begun)

    def _die(self, trainer: Trainer) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            self.lines.write(killed=trainer.global_step)
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def _wait(trainer: Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
