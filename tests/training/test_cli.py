"""The real `mhf` command in processes of its own: fit, resume, validate, test, predict, and bad input."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from forked import mhf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhf_lightning import cli
from mhf_lightning.checkpoint import verify
from mhf_lightning.checkpoint.trained import read_trained
from mhf_lightning.data.manifest import Manifest
from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = [
    *("--config", str(ROOT / "configs/model/flash_mhf.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml")),
    *("--model.decoder.vocab_size", "300", "--model.decoder.d_model", "64", "--model.decoder.num_layers", "1"),
    *("--model.decoder.ffn.d_e", "32", "--trainer.limit_val_batches", "3", "--trainer.val_check_interval", "4"),
    *("--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "4", "--model.schedule.warmup_steps", "2"),
]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> tuple[Path, list[str], str]:
    """A finished run of 8 steps: its folder, the arguments that made it, what it printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    args = [*SMALL, "--data.path", str(corpus), "--data.micro_batch_size", "4", "--run_dir", str(run_dir)]
    printed = mhf("fit", *args, "--trainer.max_steps", "8", "--sample_prompt", "def f(")
    return run_dir, args, printed


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_fit_prints_a_summary_and_writes_curves(trained):
    run_dir, _, printed = trained
    for words in ("parameters", "tokens seen", "512", "tokens/s", "peak memory", "validation before", "def f("):
        assert words in printed
    assert f"tensorboard --logdir {run_dir}" in printed
    before, after = scalars(run_dir, "val/perplexity")[0], scalars(run_dir, "val/perplexity")[7]
    assert 250 < before < 350  # the vocabulary has 300 tokens
    assert after < before
    assert len(scalars(run_dir, "train/loss")) == 8
    assert (run_dir / "checkpoints/latest").read_text() == "step-8\n"
    assert verify(run_dir / "checkpoints/step-8").about["tokens_seen"] == 512
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["decoder"]["d_model"] == 64


def test_tensorboard_shows_the_run(trained):
    """The real server, asked over HTTP for what its page would show."""
    _, _, printed = trained
    command = re.search(r"tensorboard --logdir (\S+)", printed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", command[1], "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wanted = {"train/loss", "train/perplexity", "val/perplexity", "train/lr", "memory/peak_gib"}
        shown: set[str] = set()
        deadline = time.monotonic() + 120
        while not wanted <= shown and time.monotonic() < deadline:  # the server reads one folder after the other
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
                shown.update(*json.loads(urllib.request.urlopen(url, timeout=10).read()).values())
        assert wanted <= shown
    finally:
        server.terminate()
        server.wait()


def test_an_existing_run_is_not_overwritten(trained):
    run_dir, args, _ = trained
    before = (run_dir / "config.yaml").read_text()
    assert "already holds a run" in mhf("fit", *args, "--trainer.max_steps", "8", code=2)
    assert (run_dir / "config.yaml").read_text() == before


def test_a_refused_resume_takes_no_curve_back(trained):
    run_dir, args, _ = trained
    before = {tag: scalars(run_dir, tag) for tag in ("train/loss", "val/loss")}
    early = ["--ckpt_path", str(run_dir / "checkpoints/step-4"), "--model.optimizer.lr", "0.5"]
    assert "and this start has 0.5" in mhf("fit", *args, *early, code=2)
    assert {tag: scalars(run_dir, tag) for tag in before} == before
    assert max(before["train/loss"]) >= 7


def test_a_run_from_another_s_checkpoint_keeps_its_origin(trained, tmp_path):
    """Cut off before its first checkpoint, it begins there again."""
    run_dir, args, _ = trained
    origin, branch = tmp_path / "step-4", tmp_path / "branch"
    shutil.copytree(run_dir / "checkpoints/step-4", origin)
    args = [*args, "--run_dir", str(branch), "--ckpt_path"]
    mhf("fit", *args, str(origin), "--trainer.max_steps", "8")
    shutil.rmtree(branch / "checkpoints")
    mhf("fit", *args, "auto", "--trainer.max_steps", "8")
    whole = scalars(run_dir, "train/loss")
    assert scalars(branch, "train/loss") == pytest.approx({step: whole[step] for step in range(4, 8)}, rel=1e-6)
    shutil.rmtree(branch / "checkpoints")
    shutil.rmtree(origin)
    assert f"{origin}, from which it started, is gone" in mhf("fit", *args, "auto", code=2)


def test_validate_test_and_predict_agree(trained):
    run_dir, args, _ = trained
    final = scalars(run_dir, "val/loss")[7]
    assert f"{final:.5f}"[:6] in mhf("validate", *args, "--ckpt_path", "last")
    assert f"{final:.5f}"[:6] in mhf("test", *args, "--trainer.limit_test_batches", "3", "--ckpt_path", "last")
    mhf("predict", *args, "--trainer.limit_predict_batches", "3", "--ckpt_path", "last")
    rows = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert sum(row["nll"] for row in rows) / sum(row["num_tokens"] for row in rows) == pytest.approx(final, abs=1e-4)


def test_a_finished_run_can_be_made_longer(trained):
    run_dir, args, _ = trained
    mhf("fit", *args, "--trainer.max_steps", "12", "--ckpt_path", "last")
    assert set(scalars(run_dir, "train/loss")) == set(range(12))
    assert (run_dir / "config-resume-1.yaml").exists()


def test_export_writes_a_file_that_the_decoder_loads(trained, tmp_path):
    run_dir, _, _ = trained
    output = tmp_path / "out/model.safetensors"
    assert "step-8" in mhf("export", str(run_dir / "checkpoints/step-8"), str(output))
    about, weights = json.loads(output.with_suffix(".json").read_text()), load_file(output)
    assert (about["step"], about["tokens_seen"]) == (8, 512)
    config = about["decoder"]
    decoder = Decoder(DecoderConfig(**{**config, "ffn": FFNConfig(**config["ffn"])}))
    decoder.load_state_dict(weights)
    saved = load_file(run_dir / "checkpoints/step-8/shard-00000.safetensors")
    assert all(value.equal(saved[f"model/decoder.{name}"]) for name, value in decoder.state_dict().items())
    assert "exists; move it away" in mhf("export", str(run_dir), str(output), code=2)


def test_the_checkpoint_says_whose_tokens_it_was_trained_on(trained, corpus):
    run_dir, _, _ = trained
    assert read_trained(run_dir / "checkpoints/step-8").tokenizer_sha256 == Manifest.load(corpus).tokenizer.sha256


def test_last_without_a_checkpoint_is_an_error(corpus, tmp_path):
    args = [*SMALL, "--data.path", str(corpus), "--data.micro_batch_size", "4", "--run_dir", str(tmp_path / "none")]
    assert "holds no checkpoint" in mhf("fit", *args, "--ckpt_path", "last", code=2)


def test_auto_starts_resumes_falls_back_and_refuses(corpus, tmp_path):
    run_dir = tmp_path / "run"
    args = [*SMALL, "--data.path", str(corpus), "--data.micro_batch_size", "4", "--run_dir", str(run_dir)]
    args += ["--ckpt_path", "auto", "--trainer.limit_val_batches", "0", "--checkpoint.every_n_steps", "2"]
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("of a start that was killed before its first checkpoint\n")
    mhf("fit", *args, "--trainer.max_steps", "2")
    assert scalars(run_dir, "train/tokens")[1] == 2 * 4 * 16
    mhf("fit", *args, "--trainer.max_steps", "4")
    assert set(scalars(run_dir, "train/loss")) == set(range(4))
    shard = run_dir / "checkpoints/step-4/shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-9] ^= 4
    shard.write_bytes(data)
    assert f"the newest checkpoint cannot be used: {shard} is damaged" in mhf(
        "fit", *args, "--ckpt_path", "last", code=2
    )
    printed = mhf("fit", *args, "--trainer.max_steps", "6")
    assert f"skipped a checkpoint: {shard} is damaged: its hash does not match" in printed
    assert "step-4.set-aside is of a later step" in printed
    assert scalars(run_dir, "train/tokens")[5] == 6 * 4 * 16
    for path in (run_dir / "checkpoints").glob("step-*[0-9]/index.json"):
        path.unlink()
    printed = mhf("fit", *args, "--trainer.max_steps", "8", code=2)
    assert "no checkpoint can be used" in printed
    assert "step-6/index.json is missing" in printed
    assert "step-4/index.json is missing" in printed


def test_a_strategy_without_our_checkpoints_is_refused(corpus, tmp_path):
    args = [*SMALL, "--data.path", str(corpus), "--data.micro_batch_size", "4", "--run_dir", str(tmp_path)]
    assert "use auto, ddp, or a class of" in mhf("fit", *args, "--trainer.strategy", "fsdp", code=2)


def test_a_run_folder_is_not_mixed_with_another_s_checkpoint(trained, tmp_path):
    run_dir, args, _ = trained
    copied = tmp_path / "step-8"
    shutil.copytree(run_dir / "checkpoints/step-8", copied)
    assert "already holds a run" in mhf("fit", *args, "--ckpt_path", str(copied), code=2)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("limit_train_batches", "5", "set trainer.max_steps"),
        ("limit_train_batches", "1", "set trainer.max_steps"),
        ("overfit_batches", "0.5", "set trainer.max_steps"),
        ("accumulate_grad_batches", "0", "trainer.accumulate_grad_batches is 0; it must be positive"),
        ("val_check_interval", "0", "trainer.val_check_interval is 0; it must be positive"),
        ("use_distributed_sampler", "true", "the data are dealt to ranks anyhow"),
    ],
)
def test_options_that_would_lose_or_repeat_samples_are_refused(option, value, why, corpus, tmp_path):
    args = [*SMALL, "--data.path", str(corpus), "--data.micro_batch_size", "4", "--run_dir", str(tmp_path / "run")]
    assert why in mhf("fit", *args, f"--trainer.{option}", value, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("accelerator", "tpu", "trainer.accelerator is 'tpu'; use auto, cpu or gpu"),
        ("devices", "0", "give the number of processes on the CPU, at least 1, or auto"),
        ("devices", "two", "trainer.devices is 'two'; give the number of processes on the CPU"),
        ("precision", "16-mixed", "trainer.precision is float16, which needs loss scaling"),
        ("precision", "64-true", "trainer.precision is '64-true'; use 32-true, bf16-mixed or bf16-true"),
    ],
)
def test_hardware_that_is_not_there_is_an_error(option, value, why, corpus, tmp_path):
    args = [*SMALL, "--data.path", str(corpus), "--data.micro_batch_size", "4", "--run_dir", str(tmp_path / "run")]
    assert why in mhf("fit", *args, "--trainer.accelerator", "cpu", f"--trainer.{option}", value, code=2)
    assert not (tmp_path / "run").exists()


def test_validation_of_nothing_is_an_error(trained):
    _, args, _ = trained
    assert "give --ckpt_path" in mhf("validate", *args, code=2)


def test_a_missing_corpus_is_an_error(tmp_path):
    args = [
        *SMALL,
        "--data.path",
        str(tmp_path / "nowhere"),
        "--data.micro_batch_size",
        "4",
        "--run_dir",
        str(tmp_path / "r"),
    ]
    printed = mhf("fit", *args, code=2)
    assert "nowhere" in printed
    assert "mhf data prepare" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "r" / "config.yaml").exists()  # the folder is still free for the next try


def test_an_unknown_key_names_the_nearest(tmp_path):
    required = ["--data.path", "x", "--data.micro_batch_size", "4"]
    printed = mhf("fit", *SMALL, *required, "--model.decoder.num_layer", "2", code=2)
    assert "did you mean 'model.decoder.num_layers'?" in printed
    (tmp_path / "c.yaml").write_text("model:\n  optimizer:\n    weight_decai: 0.2\n")
    printed = mhf("fit", *SMALL, *required, "--config", str(tmp_path / "c.yaml"), code=2)
    assert "did you mean 'model.optimizer.weight_decay'?" in printed


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "is empty, or no mapping"),
        ("- a\n", "is empty, or no mapping"),
        ("model: [oops\n", "Problems parsing config"),
    ],
)
def test_of_several_configs_the_wrong_one_is_named(text, hint, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    good = tmp_path / "good.yaml"
    good.write_text("model:\n  z_loss: 0.0\n")
    configs = ["--config", str(good), "--config", str(tmp_path / "wrong.yaml"), "--config", str(good)]
    printed = mhf("fit", *SMALL, "--data.path", "x", "--data.micro_batch_size", "4", *configs, code=2)
    assert "wrong.yaml: " in printed
    assert hint in printed
    assert "good.yaml" not in printed


def test_interpolation_follows_a_later_flag(corpus, tmp_path):
    """The reason for the parser mode omegaconf+: a flag that changes a target changes what refers to it."""
    (tmp_path / "c.yaml").write_text('checkpoint:\n  every_n_steps: 7\n  keep: "${.every_n_steps}"\n')
    args = [*SMALL, "--config", str(tmp_path / "c.yaml"), "--data.path", str(corpus), "--data.micro_batch_size", "4"]
    printed = mhf("fit", *args, "--checkpoint.every_n_steps", "3", "--print_config")
    assert yaml.safe_load(printed[printed.index("seed_everything") :])["checkpoint"]["keep"] == 3


@pytest.mark.parametrize(("typed", "hint"), [("fitt", "mhf fit?"), ("reprot", "mhf report?"), ("zzz", "mhf --help")])
def test_an_unknown_command_names_the_nearest(typed, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([typed, "--help"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(hint)
    assert all(command in line for command in ("report", "bench", "plan", "generate", "validate"))


def test_a_command_whose_output_nobody_reads_ends_quietly(tmp_path):
    """As of `mhf runs | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mhf_lightning.cli", "runs", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment, text=True, check=False, timeout=60
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_ctrl_c_is_one_line(command, monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main([command])
    assert capsys.readouterr().err == "\nmhf: interrupted\n"


def test_help_version_and_completion():
    start = time.perf_counter()
    command = [sys.executable, "-m", "mhf_lightning.cli", "--help"]
    assert "mhf fit" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 5
    assert mhf("--version").startswith("mhf-lightning ")
    completion = mhf("--print_completion=shtab-bash")
    assert "--model.decoder.d_model" in completion
    assert "--validation_fraction" in completion  # of mhf data prepare
    assert "--model.decoder.d_model" in mhf("fit", "--help")
