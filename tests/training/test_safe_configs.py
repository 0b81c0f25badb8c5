"""A config names classes; only those of allowed packages are imported, and no secret of the environment is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhf_lightning.training.cli import run

ROOT = Path(__file__).parents[2]
MODEL = ["--config", str(ROOT / "configs/model/flash_mhf.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml")]


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A module, on the path, whose import leaves a file behind."""
    (tmp_path / "trap.py").write_text(
        "from pathlib import Path\nfrom lightning.pytorch import Callback\n"
        "Path(__file__).with_name('sprung').touch()\nclass Trap(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(":")]))
    return tmp_path


CONFIGS = {
    "a callback": "trainer: {callbacks: [{class_path: trap.Trap}]}",
    "a logger": "trainer: {logger: {class_path: trap.Trap}}",
    "a strategy": "trainer: {strategy: {class_path: trap.Trap}}",
    "a plugin, in a list": "trainer: {plugins: [{class_path: trap.Trap}]}",
    "inside an allowed class": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, "
        "init_args: {on_fit_start: trap.Trap}}]}"
    ),
    "by way of an allowed module": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, "
        "init_args: {on_fit_start: lightning.pytorch.cli.os.system}}]}"
    ),
    "allowing it to itself": "allow_import: [trap]\ntrainer: {callbacks: [{class_path: trap.Trap}]}",
}


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_imports_nothing_from_elsewhere(trap, capsys, command, config):
    (trap / "config.yaml").write_text(config)
    with pytest.raises(SystemExit) as stopped:
        run([command, *MODEL, "--config", str(trap / "config.yaml"), "--print_config"])
    assert stopped.value.code == 2
    assert not (trap / "sprung").exists()
    said = capsys.readouterr().err
    assert "allow_import" in said or "allow-import" in said


def test_a_flag_imports_nothing_from_elsewhere(trap, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(["fit", *MODEL, "--trainer.callbacks+=trap.Trap", "--print_config"])
    assert stopped.value.code == 2
    assert not (trap / "sprung").exists()
    assert "add --allow-import trap" in capsys.readouterr().err


def test_what_the_command_line_allows_is_imported(trap):
    (trap / "config.yaml").write_text(CONFIGS["a callback"])
    command = [sys.executable, "-m", "mhf_lightning.cli", "fit", *MODEL, "--config", str(trap / "config.yaml")]
    done = subprocess.run([*command, "--allow-import", "trap", "--print_config"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "class_path: trap.Trap" in done.stdout
    assert (trap / "sprung").exists()


@pytest.mark.slow
def test_no_secret_of_the_environment_is_kept(corpus, tmp_path):
    """A canary in the variables that hold secrets is in no file of the run folder and in nothing that was printed."""
    canary = "canary-4f1d9c"
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "SLURM_JOB_COMMENT", "PLAIN")
    environment = {**os.environ, **dict.fromkeys(names, canary), "OMP_NUM_THREADS": "1"}
    sizes = ["--model.decoder.vocab_size", "300", "--model.decoder.d_model", "64", "--model.decoder.num_layers", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mhf_lightning.cli", "fit", *MODEL, *sizes, "--data.path", str(corpus)),
            *("--run_dir", str(tmp_path / "run"), "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"),
            *("--trainer.log_every_n_steps", "1", "--model.schedule.warmup_steps", "1", "--data.micro_batch_size", "2"),
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert canary not in done.stdout + done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 3  # config, curves, checkpoint
    assert not [path for path in files if canary.encode() in path.read_bytes()]
