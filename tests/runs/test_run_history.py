"""Real `mhf fit` runs: killed and resumed, preempted, failed, on two ranks; what their history says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhf_lightning.callbacks.history import process_start
from mhf_lightning.callbacks.preemption import EXIT_PREEMPTED
from mhf_lightning.data.prepare import prepare
from mhf_lightning.runs import HISTORY, read_run

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--config", str(ROOT / "configs/model/flash_mhf.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml")),
    *("--model.decoder.vocab_size", "300", "--model.decoder.d_model", "64", "--model.decoder.num_layers", "1"),
    *("--model.decoder.ffn.d_e", "32", "--trainer.limit_val_batches", "3", "--trainer.val_check_interval", "100"),
    *("--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "8", "--data.micro_batch_size", "4"),
    *("--model.schedule.warmup_steps", "2", "--ckpt_path", "auto", "--trainer.enable_progress_bar", "false"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sources = [str(path) for path in sorted((ROOT / "mhf_lightning").rglob("*.py"))]
    prepare(sources, str(folder / "data"), context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
    return folder / "data"


def begin(run_dir: Path, corpus: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mhf_lightning.cli", "fit", *SMALL]
    run_dir.parent.mkdir(exist_ok=True)
    with (run_dir.parent / "out").open("ab") as out:
        return subprocess.Popen(
            [*command, "--data.path", str(corpus), "--run_dir", str(run_dir), *args],
            stdout=out,
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / HISTORY
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_and_resumed(corpus, tmp_path):
    run_dir = tmp_path / "runs/killed"
    steps = ("--trainer.max_steps", "400")
    before = time.time()
    process = begin(run_dir, corpus, *steps)
    launched = time.time()
    wait_for(process, lambda: any((line["event"], line["step"]) == ("checkpoint", 16) for line in lines(run_dir)))
    assert (run_dir / "checkpoints/step-16").is_dir()
    process.kill()
    process.wait()
    first = lines(run_dir)
    assert [line["event"] for line in first[:2]] == ["start", "progress"]
    assert before - 0.02 <= first[0]["process_start"] <= launched
    assert first[0]["process_start"] < first[0]["time"]
    assert first[-1]["step"] < 400
    assert read_run(run_dir).state == "running"  # for now
    assert read_run(run_dir, now=time.time() + 3600).state == "lost"

    assert begin(run_dir, corpus, *steps).wait() == 0
    second = lines(run_dir)[len(first) :]
    assert lines(run_dir)[: len(first)] == first
    resumed = second[0]["step"]
    assert resumed >= 16
    assert (second[0]["event"], second[0]["restart"], second[0]["tokens"]) == ("start", 1, resumed * 64)
    (done,) = [line["done"] for line in first if line["event"] == "checkpoint" and line["step"] == resumed]
    finished = min(line["time"] for line in second if line["step"] == 400)
    useful = (done - first[0]["time"]) + (finished - second[0]["time"])
    run = read_run(run_dir)
    assert (run.state, run.step, run.tokens, run.restarts) == ("completed", 400, 400 * 64, 1)
    assert run.goodput == pytest.approx(useful / (second[-1]["time"] - first[0]["process_start"]))
    assert 0 < run.goodput < 1
    assert run.last_checkpoint == run_dir / "checkpoints/step-400"

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    for line in second:
        if line["event"] == "progress":
            assert line["loss"] == pytest.approx(losses[line["step"] - 1])  # curves count from 0
    perplexities = {event.step: event.value for event in events.Scalars("val/perplexity")}
    assert run.perplexity == pytest.approx(perplexities[399])
    every = [line["step"] for line in second if line["event"] == "validation"]
    assert every == [100, 200, 300, 400]
    saved = [line["step"] for line in second if line["event"] == "checkpoint"]
    assert saved == list(range(resumed + 8, 401, 8))


@pytest.mark.slow
def test_preempted_by_a_signal(corpus, tmp_path):
    run_dir = tmp_path / "runs/preempted"
    process = begin(run_dir, corpus, "--trainer.max_steps", "100000", "--checkpoint.every_n_steps", "100000")
    wait_for(process, lambda: any(line["event"] == "progress" for line in lines(run_dir)))
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == EXIT_PREEMPTED
    history = lines(run_dir)
    assert [line["event"] for line in history if line["event"] != "validation"] == [
        "start", "progress", "checkpoint", "end"
    ]  # fmt: skip
    saved, end = history[-2:]
    assert (end["reason"], end["step"], end["tokens"]) == ("preempted", saved["step"], saved["step"] * 64)
    run = read_run(run_dir)
    assert (run.state, run.step, run.restarts) == ("preempted", end["step"], 0)
    useful = saved["done"] - history[0]["time"]
    assert run.goodput == pytest.approx(useful / (end["time"] - history[0]["process_start"]))


@pytest.mark.slow
def test_failed_and_stopped(corpus, tmp_path):
    run_dir = tmp_path / "runs/failed"
    diverging = ("--model.optimizer.lr", "1e30", "--model.max_skipped_steps", "0", "--trainer.max_steps", "50")
    assert begin(run_dir, corpus, *diverging).wait() != 0
    run = read_run(run_dir)
    assert run.state == "failed"
    assert run.reason.startswith("NonFiniteError: step ")
    assert begin(tmp_path / "runs/stopped", corpus, "--trainer.max_time", "00:00:00:01").wait() == 0
    run = read_run(tmp_path / "runs/stopped")
    assert run.state == "stopped"
    assert 0 < run.step < run.max_steps == 1000


@pytest.mark.slow
def test_an_error_in_training_is_none_of_the_options(corpus, tmp_path):
    """slurm/pretrain.sbatch gives up at exit code 2 and tries again after 1."""
    run_dir = tmp_path / "runs/unsaved"
    unsaved = run_dir / "checkpoints/step-8.tmp"
    unsaved.parent.mkdir(parents=True)
    unsaved.touch()  # no folder can be made in its place
    assert begin(run_dir, corpus, "--trainer.max_steps", "8").wait() == 1
    assert f"{unsaved} could not be made" in (tmp_path / "runs/out").read_text()
    assert [line["event"] for line in lines(run_dir)] == [
        "start",
        "progress",
        "validation",
        "progress",
        "end",
    ]  # no checkpoint


@pytest.mark.slow
def test_two_ranks_write_one_history(corpus, tmp_path):
    run_dir = tmp_path / "runs/two"
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "8")
    two += ("--trainer.accumulate_grad_batches", "2")
    assert begin(run_dir, corpus, *two).wait() == 0, (tmp_path / "runs/out").read_text()
    history = lines(run_dir)
    events = ["start", "progress", "validation", "progress", "checkpoint", "end"]
    assert [line["event"] for line in history] == events
    assert (history[0]["world_size"], len(history[0]["hosts"])) == (2, 1)
    assert (history[1]["step"], history[1]["loss"] is None) == (1, False)  # not after its first micro-batch
    assert history[-1]["tokens"] == 8 * 2 * 2 * 64
    assert history[-1]["reason"] == "completed"


def test_process_start():
    code = "import time; first_line = time.time(); from mhf_lightning.callbacks import history as h; "
    code += "print(h.process_start(), first_line)"
    before = time.time()
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    begun, first_line = map(float, printed.split())
    assert before - 0.02 <= begun <= first_line + 0.02
    assert process_start() < before
