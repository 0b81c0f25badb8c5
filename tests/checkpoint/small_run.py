"""A small pretraining run on real gloo processes, that can be started, killed, resumed and compared.

Processes are forked from a server that has imported everything, so a start takes a second instead of ten.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import sysconfig
import time
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from mhf_lightning.callbacks.checkpoint import CheckpointConfig, StepCheckpoint
from mhf_lightning.checkpoint.folder import find_newest_valid, verify
from mhf_lightning.checkpoint.shards import Reader
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.data.datamodule import TokenDataModule
from mhf_lightning.data.prepare import prepare
from mhf_lightning.data.sampler import GlobalOrderSampler
from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.training.cli import find_checkpoint
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig
from mhf_lightning.training.ranks import data_parallel_ranks
from mhf_lightning.training.strategies import MHFDDP, MHFFSDP2

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """What a run is; everything but ``name`` may differ between a run and its resumption."""

    corpus: str
    folder: str
    strategy: str = "single"  # single, ddp, zero2, fsdp2 (data-parallel ranks), tp (tensor-parallel ranks)
    ranks: int = 1
    micro_batch: int = 2
    accumulate: int = 4
    workers: int = 0
    dropout: float = 0.1
    max_steps: int = 10
    every: int = 3
    keep: int = 2
    background: bool = True
    validate_every: int = 5  # optimiser steps
    poisoned: tuple[int, ...] = ()  # steps whose loss is NaN, counted from 1
    max_skipped_steps: int = 3
    fused: bool = False  # AdamW as on a GPU, where steps are left out on the device, and counted one step later
    weights: int = 32  # d_model
    stop_at: int | None = None  # end the processes, as cut off, when this step was done and its checkpoint committed
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return Path(self.folder) / "checkpoints"

    def logs(self) -> list[list[dict[str, Any]]]:
        """Per attempt, the micro-batches of all ranks."""
        attempts = sorted(Path(self.folder).glob("attempt-*"), key=lambda path: int(path.name[8:]))
        return [
            [json.loads(line) for log in path.glob("rank-*") for line in log.read_text().splitlines()]
            for path in attempts
        ]


def make_corpus(folder: Path) -> str:
    """Blocks of 16 tokens, vocabulary 300."""
    sources = Path(sysconfig.get_path("stdlib")) / "json"
    files = [str(path) for path in sorted(sources.glob("*.py"))]
    prepare(files, str(folder / "data"), context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
    return str(folder / "data")


class Poisoned(PretrainModule):
    """Spoils the loss of the run's ``poisoned`` steps."""

    run: Run

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step + 1 in self.run.poisoned else loss

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["fused"] = self.run.fused
        return configured


class Log(Callback):
    """Writes what each micro-batch read and what each step's loss was, at once, so that a kill loses nothing."""

    def __init__(self, run: Run, rank: int, start: int) -> None:
        self.run, self.start = run, start
        attempt = len(list(Path(run.folder).glob("attempt-*"))) if rank == 0 else 0
        self.attempt = int(os.environ.get("ATTEMPT", attempt))
        path = Path(run.folder) / f"attempt-{self.attempt}" / f"rank-{rank}"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")

    def on_train_start(self, trainer, pl_module):
        self.write(event="start", step=trainer.global_step, expected=self.start)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.callback_metrics.get("train/loss")
        done = trainer.global_step
        ended = (batch_idx + 1) % self.run.accumulate == 0
        self.write(
            event="micro-batch",
            step=done if ended else done + 1,
            loss=float(loss).hex() if ended else None,
            skipped=pl_module.skipped_steps,
            replica=data_parallel_ranks(trainer)[0],
            batch=batch_idx,
            samples=batch["sample_index"].tolist(),
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.run.stop_at:
            trainer.strategy.wait_for_save()
            trainer.strategy.barrier()
            os._exit(0)

    def on_validation_batch_start(self, *_):
        self.write(event="validation")
        time.sleep(0.02)  # so that a kill can be aimed at a validation

    def on_validation_end(self, trainer, pl_module):
        self.write(event="validated", step=trainer.global_step, loss=float(trainer.callback_metrics["val/loss"]).hex())


def train(run: Run, rank: int, port: int, ckpt_path: str | None, attempt: int, start: int) -> None:
    """One rank's process; ``start`` is the step that it should go on from."""
    output = os.open(Path(run.folder, f"output-{attempt}-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ATTEMPT=str(attempt)
    )
    os.environ.update(run.environment)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers: a server would outlive a SIGKILL
    torch.set_num_threads(1)
    seed_everything(11)
    decoder = DecoderConfig(
        vocab_size=300,
        d_model=run.weights,
        num_layers=2,
        num_attention_heads=4,
        ffn=FFNConfig("flash_mhf", num_heads=4, num_subnetworks=2, d_e=16),
        dropout=run.dropout,
    )
    optimizer = OptimizerConfig(lr=1e-2, grad_clip=0.5)
    schedule = ScheduleConfig(warmup_steps=3, total_steps=40)
    module = Poisoned(decoder, optimizer, schedule, z_loss=1e-4, max_skipped_steps=run.max_skipped_steps)
    module.run = run
    strategy: Any = {
        "single": lambda: MHFSingleDevice("cpu"),
        "ddp": lambda: MHFDDP(process_group_backend="gloo"),
        "fsdp2": lambda: MHFFSDP2(data_parallel_size=run.ranks, process_group_backend="gloo"),
        "zero2": lambda: cpu_deepspeed()(2, process_group_backend="gloo"),
        "tp": lambda: MHFFSDP2(data_parallel_size=1, tensor_parallel_size=run.ranks, process_group_backend="gloo"),
    }[run.strategy]()
    checkpoint = StepCheckpoint(run.checkpoints, CheckpointConfig(run.every, run.keep, background=run.background))
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=run.ranks,
        max_steps=run.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=run.accumulate,
        val_check_interval=run.validate_every * run.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=4,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[checkpoint, Log(run, rank, start)],
    )
    data = TokenDataModule(run.corpus, micro_batch_size=run.micro_batch, num_workers=run.workers)
    path = find_checkpoint(run.checkpoints) if ckpt_path == "auto" else ckpt_path
    try:
        trainer.fit(module, data, ckpt_path=path)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def cpu_deepspeed() -> Any:
    """The strategy that the parity tests use."""
    sys.path.insert(0, str(ROOT / "tests/distributed"))
    from worker import CPUDeepSpeed

    return CPUDeepSpeed


class Started:
    """The processes of a run."""

    def __init__(self, run: Run, ckpt_path: str | None = None) -> None:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        path = find_newest_valid(run.checkpoints)[0] if ckpt_path == "auto" else ckpt_path
        start = 0 if path is None else verify(path).step
        self.run, self.attempt = run, len(list(Path(run.folder).glob("attempt-*")))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # the server's own
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["small_run"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            context.Process(target=train, args=(run, rank, port, ckpt_path, self.attempt, start))
            for rank in range(run.ranks)
        ]
        for process in self.processes:
            process.start()

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank has logged so far."""
        path = Path(self.run.folder, f"attempt-{self.attempt}", f"rank-{rank}")
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def output(self) -> str:
        """What all ranks printed."""
        return "".join(path.read_text() for path in Path(self.run.folder).glob(f"output-{self.attempt}-*"))

    def wait_until(self, condition: Any, seconds: float = 180.0) -> None:
        """Return when the condition holds or a process has ended."""
        deadline = time.monotonic() + seconds
        while not condition() and all(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.001)

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Exit codes; processes that do not end are killed and have none."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL a rank, then, as a launcher does, the others; or all of them at once."""
        if rank is not None and self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, signal.SIGKILL)
            self.processes[rank].join()
            time.sleep(random.uniform(0, 0.05))
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def finish(run: Run, ckpt_path: str | None = None) -> str:
    """Run to the end; return what was printed."""
    started = Started(run, ckpt_path)
    codes = started.wait()
    assert codes == [0] * run.ranks, f"{codes}\n{started.output()}"
    return started.output()


def losses(attempts: list[list[dict[str, Any]]]) -> dict[int, str]:
    """The loss of each step, as the last attempt that did it saw it."""
    return {
        event["step"]: event["loss"]
        for events in attempts
        for event in events
        if event["event"] == "micro-batch" and event["loss"] is not None
    }


def validations(attempts: list[list[dict[str, Any]]]) -> dict[int, set[str]]:
    """The validation losses of each step, by all attempts and ranks."""
    found: dict[int, set[str]] = {}
    for events in attempts:
        for event in events:
            if event["event"] == "validated":
                found.setdefault(event["step"], set()).add(event["loss"])
    return found


def history(run: Run) -> list[list[int]]:
    """The blocks of each optimiser step of the run as it counts: what an attempt did before the next one took over.

    Asserts that every attempt goes on from the checkpoint that was the newest then, without a hole. (A run that starts
    again from 0 repeats the same steps, so that nothing else shows it.)
    """
    steps: dict[int, dict[tuple[int, int], list[int]]] = {}  # by data-parallel rank and micro-batch
    for events in run.logs():
        starts = {(event["step"], event["expected"]) for event in events if event["event"] == "start"}
        if not starts:
            continue  # killed before it began
        ((start, expected),) = starts
        assert start == expected
        assert all(step in steps for step in range(1, start + 1))
        steps = {step: read for step, read in steps.items() if step <= start}
        for event in events:
            if event["event"] == "micro-batch":
                read = steps.setdefault(event["step"], {})
                samples = read.setdefault((event["replica"], event["batch"]), event["samples"])
                assert samples == event["samples"]  # on all ranks of a split replica
    return [sorted(chain(*steps[step].values())) for step in sorted(steps)]


def expected_history(run: Run, global_batch: int, steps: int) -> list[list[int]]:
    """The blocks of each step by the definition of the order."""
    from mhf_lightning.data.manifest import Manifest

    blocks = Manifest.load(run.corpus).splits["train"].blocks
    order = GlobalOrderSampler(blocks, steps * global_batch, 1234, micro_batch_size=1)
    return [
        sorted(order.block_of(sample) for sample in range(step * global_batch, (step + 1) * global_batch))
        for step in range(steps)
    ]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole: weights and optimiser."""
    reader = Reader(folder)
    whole = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in reader.shapes("").items()}
    reader.load(whole)
    return whole


def assert_equal(ours: Path, theirs: Path) -> None:
    """Weights and optimiser of two checkpoints are bitwise equal."""
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys()
    assert any(name.startswith("optimizer/0/") for name in a)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


__all__ = [
    "Run",
    "Started",
    "assert_equal",
    "expected_history",
    "finish",
    "history",
    "losses",
    "make_corpus",
    "replace",
    "tensors",
    "validations",
]
