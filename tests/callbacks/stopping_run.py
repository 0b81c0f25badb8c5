"""A small run on two gloo ranks that are sent signals by a callback at chosen moments.

Processes are forked from a server that has imported everything, as in tests/checkpoint/small_run.py.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from mhf_lightning.callbacks.checkpoint import CheckpointConfig, StepCheckpoint
from mhf_lightning.callbacks.preemption import Preemption
from mhf_lightning.data.datamodule import TokenDataModule
from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.signals import block_stop_signals
from mhf_lightning.training.cli import find_checkpoint
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig
from mhf_lightning.training.strategies import MHFDDP

STEPS = 12
VALIDATE_EVERY = 4


@dataclass(frozen=True)
class Case:
    """When which ranks are sent what; the slow rank is slow from the signal's step on."""

    folder: Path
    corpus: str
    moment: str = ""
    ranks: tuple[int, ...] = (0,)
    number: signal.Signals = signal.SIGUSR1
    slow_rank: int | None = None
    compile_blocks: bool = False


class Moments(Callback):
    """Sends the signal, once; logs what happened; slows a rank down."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank, self.sent = case, rank, False
        self.file = (case.folder / f"{rank}.jsonl").open("a", buffering=1)

    def send(self, moment: str) -> None:
        if self.case.moment == moment and self.rank in self.case.ranks and not self.sent:
            self.sent = True
            self.write(sent=moment)
            os.kill(os.getpid(), self.case.number)

    def write(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")

    def on_sanity_check_start(self, trainer, pl_module):
        self.send("sanity check")

    def on_train_start(self, trainer, pl_module):
        self.write(start=trainer.global_step)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        slow = self.rank == self.case.slow_rank and trainer.global_step >= int(self.case.moment.split()[-1])
        time.sleep(0.5 if slow else 0.0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            self.write(step=trainer.global_step, loss=float(trainer.callback_metrics["train/loss"]).hex())
            self.send(f"step {trainer.global_step}")

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.send(f"validation after step {trainer.global_step}")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.write(validated=trainer.global_step, loss=float(trainer.callback_metrics["val/loss"]).hex())

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.send(f"save of step {trainer.global_step}")


def train(case: Case, rank: int, rendezvous: Path) -> None:
    """One rank's process."""
    block_stop_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    output = os.open(case.folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    seed_everything(3)
    ffn = FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=16)
    decoder = DecoderConfig(vocab_size=300, d_model=32, num_layers=2, num_attention_heads=2, ffn=ffn, dropout=0.1)
    module = PretrainModule(
        decoder, OptimizerConfig(lr=1e-2), ScheduleConfig(warmup_steps=3), compile_blocks=case.compile_blocks
    )
    checkpoint = StepCheckpoint(case.folder / "checkpoints", CheckpointConfig(every_n_steps=5))
    moments = Moments(case, rank)
    torch._dynamo.callback.callback_handler.register_start_callback(lambda *_: moments.send("compilation"))
    trainer = Trainer(
        strategy=MHFDDP(process_group_backend="gloo"),
        accelerator="cpu",
        devices=2,
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=2 * VALIDATE_EVERY,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[checkpoint, Preemption(checkpoint), moments],
    )
    data = TokenDataModule(case.corpus, micro_batch_size=2)
    trainer.fit(module, data, ckpt_path=find_checkpoint(case.folder / "checkpoints"))


def start(case: Case) -> list[multiprocessing.Process]:
    """Start both ranks."""
    case.folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # the server's own
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stopping_run"])
    rendezvous = case.folder / f"rendezvous-{uuid.uuid4().hex}"  # a port that is free now may not be later
    processes = [context.Process(target=train, args=(case, rank, rendezvous)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def wait(case: Case, processes: list[multiprocessing.Process], seconds: float = 120.0) -> list[int | None]:
    """Exit codes; None for a process that had to be killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def output(case: Case) -> str:
    """What both ranks printed."""
    return "".join(path.read_text() for path in sorted(case.folder.glob("output-*")))


def events(case: Case, rank: int = 0) -> list[dict]:
    """What a rank did, over all starts."""
    return [json.loads(line) for line in (case.folder / f"{rank}.jsonl").read_text().splitlines()]


def losses(case: Case, key: str = "step") -> dict[int, str]:
    """Of each step (``step``) or validation (``validated``); asserts that what was done twice came out the same."""
    found: dict[int, str] = {}
    for event in events(case):
        if key in event:
            assert found.setdefault(event[key], event["loss"]) == event["loss"], event
    return found
