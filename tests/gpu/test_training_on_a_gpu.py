"""Training on one CUDA device by the real command: FSDP2 and DeepSpeed with the Triton op, saved and resumed."""

from __future__ import annotations

import csv
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhf_lightning.data.prepare import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
STRATEGIES = {
    "gpu": [],
    "ddp": [],
    "fsdp2": ["--trainer.strategy.init_args.data_parallel_size", "1"],
    "deepspeed_zero2": [],
    "deepspeed_zero3": [],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    files = [str(path) for path in sorted(Path(csv.__file__).parent.glob("*.py"))[:40]]
    prepare(files, str(folder / "data"), context_length=128, vocab_size=300, validation_fraction=0.1, num_workers=1)
    return folder / "data"


def fit(corpus: Path, run_dir: Path, strategy: str, *more: str) -> dict[int, float]:
    """Run `mhf fit`, and return the loss of each step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = [
        *("--config", str(ROOT / "configs/model/flash_mhf.yaml")),
        *("--config", str(ROOT / f"configs/trainer/{strategy}.yaml"), "--trainer.devices", "1"),
        *("--model.decoder.vocab_size", "304", "--model.decoder.dropout", "0.1", "--model.schedule.warmup_steps", "2"),
        *("--trainer.limit_val_batches", "2", "--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "4"),
        *("--data.path", str(corpus), "--data.micro_batch_size", "4", "--trainer.accumulate_grad_batches", "2"),
        *("--run_dir", str(run_dir), "--ckpt_path", "auto", *STRATEGIES[strategy], *more),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mhf_lightning.cli", "fit", *options],
        env={**os.environ, "MHF_BACKEND": "triton", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fit_save_and_resume(strategy, corpus, tmp_path):
    """A run that is cut at its checkpoint and continued ends with the losses of one that is not cut, and learns."""
    if strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    whole = fit(corpus, tmp_path / "whole", strategy, "--trainer.max_steps", "12")
    first = fit(corpus, tmp_path / "cut", strategy, "--trainer.max_steps", "8", "--model.schedule.total_steps", "12")
    both = fit(corpus, tmp_path / "cut", strategy, "--trainer.max_steps", "12")
    assert max(first) < max(both)
    for step, loss in whole.items():
        assert both[step] == pytest.approx(loss, rel=2e-3), step
    assert whole[max(whole)] < whole[min(whole)]
