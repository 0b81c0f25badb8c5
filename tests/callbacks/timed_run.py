"""A training run whose every part takes a known time of a fake clock; in this process, or on two gloo processes.

``python timed_run.py CASES.json OUT_DIR`` with torchrun's variables in the environment trains each case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, Dataset

from mhf_lightning.callbacks.layout import Layout
from mhf_lightning.callbacks.memory import PeakMemory
from mhf_lightning.callbacks.model_health import ModelHealth
from mhf_lightning.callbacks.progress import ProgressLines, StepProgressBar
from mhf_lightning.callbacks.router_health import RouterHealth
from mhf_lightning.callbacks.run_text import RunText
from mhf_lightning.callbacks.throughput import Throughput
from mhf_lightning.callbacks.timeline import ClockMark
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig
from mhf_lightning.training.ranks import data_parallel_ranks
from mhf_lightning.training.strategies import MHFDDP, MHFFSDP2

LENGTH = 8
CONFIG = DecoderConfig(
    vocab_size=40,
    d_model=32,
    num_layers=2,
    num_attention_heads=4,
    ffn=FFNConfig("flash_mhf", num_heads=4, num_subnetworks=3, d_e=8),
)
# Seconds of each part of a micro-batch, of a validation batch and of a checkpoint.
SECONDS = {"data": 0.25, "forward": 1.0, "backward": 2.0, "optimizer": 0.5, "logging": 0.125}
VALIDATION, CHECKPOINT, COMPILE = 7.0, 40.0, 100.0


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now, self.speed = 0.0, 1.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds * self.speed


CLOCK = Clock()


class Points(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, dict[int, float]] = {}

    name = version = "points"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.points.setdefault(tag, {})[step] = float(value)


class Batches(Dataset):
    """Batches of given numbers of rows, with unequal numbers of targets; each takes its time."""

    def __init__(self, rows: list[int], seed: int, seconds: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seconds, self.items = seconds, []
        for i, n in enumerate(rows):
            tokens = torch.randint(40, (n, LENGTH + 1), generator=generator)
            labels = tokens[:, 1:].clone()
            labels[:, (i + seed) % LENGTH + 1 :] = -100
            self.items.append({"input_ids": tokens[:, :-1], "labels": labels, "sample_index": torch.arange(n)})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        CLOCK.advance(self.seconds)
        return self.items[i]


class Data(LightningDataModule):
    """``rows[r]`` are the rows of the training batches of data-parallel rank r; validation is uneven too."""

    manifest = SimpleNamespace(
        vocab_size=CONFIG.vocab_size,
        splits={
            "train": SimpleNamespace(tokens=1000, text_bytes=4000),
            "validation": SimpleNamespace(tokens=100, text_bytes=200),
        },
    )

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__()
        self.rows = rows
        self.micro_batch_size, self.consumed_samples = max(rows[0]), 0

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples}

    def train_dataloader(self) -> DataLoader:
        rank = data_parallel_ranks(self.trainer)[0]
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        batches = Batches(self.rows[rank], rank, SECONDS["data"])
        batches.items = batches.items[done:] + batches.items[:done]
        return DataLoader(batches, batch_size=None)

    def validation(self, rank: int) -> Batches:
        return Batches([4, 3 - rank], 100 + rank, 0.0)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation(data_parallel_ranks(self.trainer)[0]), batch_size=None)


class Timed(PretrainModule):
    """Takes ``SECONDS``, and much longer for its first micro-batch."""

    compiled = False
    fused = False  # AdamW as on a GPU

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        CLOCK.advance(SECONDS["forward"] if self.compiled else COMPILE)
        self.compiled = True
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(lambda grad: CLOCK.advance(SECONDS["backward"]))
        return loss

    def configure_optimizers(self) -> Any:
        configured: Any = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["fused"] = self.fused
        return configured

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        CLOCK.advance(SECONDS["optimizer"])
        super().configure_gradient_clipping(*args, **kwargs)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        CLOCK.advance(VALIDATION)
        super().validation_step(batch, batch_idx)


class Last(Callback):
    """Takes the time of the callbacks; keeps the exact validation loss, and one worked out without any metric."""

    def __init__(self, save_after: int | None, folder: Path | None) -> None:
        self.save_after, self.folder = save_after, folder
        self.val: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        CLOCK.advance(SECONDS["logging"])
        if trainer.global_step == self.save_after and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.folder / f"step-{self.save_after}")
            trainer.strategy.wait_for_save()

    def on_save_checkpoint(self, *_: Any) -> None:
        CLOCK.advance(CHECKPOINT)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        exact = pl_module.val_perplexity.compute()
        nll = tokens = 0.0
        for rank in range(data_parallel_ranks(trainer)[1]):
            for batch in trainer.datamodule.validation(rank).items:
                sums = pl_module.decoder(batch["input_ids"], batch["labels"])
                nll, tokens = nll + float(sums.nll), tokens + float((batch["labels"] >= 0).sum())
        direct = torch.tensor(nll / tokens, dtype=torch.float64).exp()
        self.val = {"perplexity": float(exact["perplexity"]), "direct": float(direct)}


def callbacks_of(case: dict[str, Any]) -> list[Callback]:
    """The callbacks that the case asks for."""
    if not case.get("monitored", True):
        return []
    callbacks = [Throughput(case.get("peak_tflops")), PeakMemory(), RouterHealth(case.get("router", 0)), ModelHealth()]
    callbacks += [Layout(), RunText("run_dir: runs/run")] if "logdir" in case else []
    bars = {"bar": StepProgressBar, "lines": ProgressLines}
    return [*callbacks, *([bars[case["progress"]]()] if "progress" in case else [])]


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case.

    It has strategy, rows and steps, and may have accumulate, every (steps between points), validate_every
    (micro-batches), speeds (of the ranks' clocks), router (steps), dropout, module (arguments of PretrainModule),
    logdir, progress (bar or lines), profiler (Lightning's name), save_after, folder, resume, and monitored: false for a
    run without our callbacks.
    """
    CLOCK.now, CLOCK.speed = 0.0, case.get("speeds", {}).get(os.environ.get("RANK", "0"), 1.0)
    ClockMark.clock = CLOCK
    seed_everything(5)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(case["folder"]) if "folder" in case else None
    config = replace(CONFIG, dropout=case.get("dropout", 0.0))
    module = Timed(config, OptimizerConfig(lr=3e-3), ScheduleConfig(warmup_steps=2), **case.get("module", {}))
    extra = callbacks_of(case)
    last, points = Last(case.get("save_after"), folder), Points()
    strategies = {
        "single": lambda: MHFSingleDevice("cpu"),
        "ddp": MHFDDP,
        "fsdp2": lambda: MHFFSDP2(world, 1),
        "tp": lambda: MHFFSDP2(1, world),
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategies[case["strategy"]](),
        max_steps=case["steps"],
        max_epochs=-1,
        accumulate_grad_batches=case.get("accumulate", 1),
        log_every_n_steps=case.get("every", 1),
        val_check_interval=case.get("validate_every"),
        limit_val_batches=1.0 if "validate_every" in case else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        callbacks=[*extra, last],
        logger=[points, *([TensorBoardLogger(case["logdir"], name="", version="")] if "logdir" in case else [])],
        enable_checkpointing=False,
        enable_progress_bar="progress" in case,
        profiler=case.get("profiler"),
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Data(case["rows"]), ckpt_path=case.get("resume"))
    result = {"points": points.points, "val": last.val, "weights": float(module.decoder.embedding.weight.sum())}
    for meter in extra:
        if isinstance(meter, Throughput):
            result["totals"] = {"tokens": meter.tokens, "samples": meter.samples, "seconds": meter.seconds}
        if isinstance(meter, ModelHealth):
            result["spikes"] = meter.state_dict()
    return result


def train_on_ranks(cases: dict[str, dict[str, Any]], world: int, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Train every case on ``world`` gloo processes; return the results by case of each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            **{"WORLD_SIZE": str(world), "RANK": str(rank)},
            **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "NODE_RANK": "0"},
            **{"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"},
        }
        command = [sys.executable, __file__, str(folder / "cases.json"), str(folder)]
        with (folder / f"log{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world, "\n".join((folder / f"log{rank}.txt").read_text()[-3000:] for rank in range(world))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def main() -> None:
    """Run all cases; a case that fails is recorded with its traceback, the others go on."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Before Lightning, which would want a port: one that is free now may not be when the ranks have started.
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    results = {}
    for name, case in cases.items():
        try:
            results[name] = train(case)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
