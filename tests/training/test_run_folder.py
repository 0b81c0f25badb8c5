"""The run folder is one training's at a time; errors of options are one line and exit code 2."""

import errno
import fcntl
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import mhf, start
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mhf_lightning.callbacks.run_folder import ResolvedConfig
from mhf_lightning.runs.cli import main as runs_main
from mhf_lightning.runs.read import find_runs
from mhf_lightning.training.cli import MHFCLI
from mhf_lightning.training.ranks import is_first_process
from mhf_lightning.training.run_lock import lock_run_folder

ROOT = Path(__file__).parents[2]
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def arguments(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("--config", str(ROOT / "configs/model/flash_mhf.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml")),
        *("--model.decoder.vocab_size", "300", "--model.decoder.d_model", "64", "--model.decoder.num_layers", "1"),
        *("--model.decoder.ffn.d_e", "32", "--trainer.limit_val_batches", "0", "--data.path", str(corpus)),
        *("--data.micro_batch_size", "4", "--model.schedule.warmup_steps", "1", "--run_dir", str(run_dir), *more),
    ]


def error_line(printed: str) -> str:
    """The one line of an error, which is the last."""
    assert "Traceback" not in printed
    assert printed.count("mhf: error: ") == 1
    return printed.splitlines()[-1].removeprefix("mhf: error: ")


def hold(run_dir: Path, workers) -> None:
    """Hold the lock, with a forked worker that lives on."""
    lock_run_folder(run_dir)
    worker = os.fork()
    if worker:
        workers.put(worker)
    time.sleep(60)
    os._exit(0)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path, with the worker it forked."""
    context = multiprocessing.get_context("fork")
    workers = context.Queue()
    process = context.Process(target=hold, args=(tmp_path, workers))
    process.start()
    worker = workers.get(timeout=60)
    yield process
    os.kill(worker, signal.SIGKILL)
    process.kill()
    process.join()


def test_a_folder_has_one_training_and_a_killed_one_frees_it(holder, tmp_path):
    who = f"pid {holder.pid} on host {socket.gethostname()}"
    assert (tmp_path / "lock").read_text() == who + "\n"
    with pytest.raises(ValueError, match=f"^{who} is training into {tmp_path}; wait for it, end it, or choose another"):
        lock_run_folder(tmp_path)
    assert (tmp_path / "lock").read_text() == who + "\n"
    holder.kill()
    holder.join()
    context = multiprocessing.get_context("fork")
    again = context.Process(target=lock_run_folder, args=(tmp_path,))  # although a worker of the killed one lives on
    again.start()
    again.join()
    assert again.exitcode == 0
    assert (tmp_path / "lock").read_text() == f"pid {again.pid} on host {socket.gethostname()}\n"
    assert find_runs(tmp_path) == []


def test_an_earlier_start_of_the_same_job_does_not_end_a_requeued_one(holder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MHF_START_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(ValueError, match="is training into"):
        lock_run_folder(tmp_path)
    (tmp_path / "lock").write_text("pid 1 on host vm of job 12\n")
    lock_run_folder(tmp_path)
    assert "pid 1 on host vm of job 12 still holds" in capsys.readouterr().err


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock_run_folder(tmp_path)
    assert f"mhf: warning: cannot lock {tmp_path / 'lock'} (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ("", True),
        ("LOCAL_RANK=1 NODE_RANK=0", False),  # started by Lightning
        ("RANK=0 LOCAL_RANK=0 GROUP_RANK=0", True),  # torchrun
        ("RANK=1 LOCAL_RANK=1 GROUP_RANK=0", False),
        ("RANK=2 LOCAL_RANK=0 GROUP_RANK=1", False),
        ("RANK=0 LOCAL_RANK=0 SLURM_PROCID=1", True),  # torchrun on the second node of a job
        ("SLURM_PROCID=0", True),
        ("SLURM_PROCID=3", False),
        ("NODE_RANK=1", False),  # by hand, one command a machine
        ("OMPI_COMM_WORLD_RANK=1", False),
    ],
)
def test_the_first_process_is_known_before_there_is_a_trainer(environment, first, monkeypatch):
    for key in RANKS:
        monkeypatch.delenv(key, raising=False)
    for pair in environment.split():
        monkeypatch.setenv(*pair.split("="))
    assert is_first_process() is first


@pytest.mark.slow
def test_a_second_fit_is_refused_while_the_first_trains(corpus, tmp_path):
    run_dir = tmp_path / "run"
    out = tmp_path / "printed"
    out.touch()
    args = arguments(corpus, run_dir, "--trainer.max_steps", "1000000", "--trainer.log_every_n_steps", "1")
    first = start(["fit", *args], Path.cwd(), {**os.environ, "OMP_NUM_THREADS": "1"}, (str(out), str(out)))
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "config.yaml").exists():
            assert first.is_alive(), out.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for more in ([], ["--ckpt_path", "auto"]):
            error = error_line(mhf("fit", *args, *more, code=2))
            assert re.fullmatch(rf"pid {first.pid} on host \S+ is training into {run_dir}; wait for it, .*", error)
        assert not (run_dir / "config-resume-1.yaml").exists()
        mhf("fit", *args, "--ckpt_path", "auto", "--trainer.fast_dev_run", "2")
    finally:
        first.kill()
        first.join()
    mhf("fit", *args, "--ckpt_path", "auto", "--trainer.max_time", "00:00:00:01")


@pytest.mark.slow
def test_processes_that_lightning_starts_share_the_lock(corpus, tmp_path):
    args = arguments(corpus, tmp_path / "run", "--trainer.max_steps", "2", "--trainer.devices", "2")
    environment = {key: value for key, value in os.environ.items() if key not in RANKS} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mhf_lightning.cli", "fit", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/checkpoints/step-2").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "fast_dev_run", "predict"])
@pytest.mark.parametrize("kind", ["a file", "in a file", "/proc/x"])
def test_a_folder_that_cannot_be_written_is_named(corpus, tmp_path, command, kind):
    (tmp_path / "taken").touch()
    run_dir = {"a file": tmp_path / "taken", "in a file": tmp_path / "taken/run", "/proc/x": Path("/proc/x")}[kind]
    if command == "predict":
        cli: MHFCLI = MHFCLI.__new__(MHFCLI)
        cli.subcommand, cli.config = "predict", {"predict": {"run_dir": str(run_dir)}}
        with pytest.raises(ValueError, match="choose another --run_dir"):
            cli.predict()
        return
    more = ["--trainer.fast_dev_run", "1"] if command == "fast_dev_run" else []
    error = error_line(mhf("fit", *arguments(corpus, run_dir, *more), code=2))
    assert re.fullmatch(rf"cannot write to {run_dir}: .*; choose another --run_dir", error)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_run_as_it_was(corpus, small_disk):
    run_dir = small_disk / "run"
    mhf("fit", *arguments(corpus, run_dir, "--trainer.max_steps", "1"))
    (run_dir / "lock").write_text("")
    before = contents(run_dir)
    with suppress(OSError), (small_disk / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    printed = mhf("fit", *arguments(corpus, run_dir, "--trainer.max_steps", "2", "--ckpt_path", "auto"), code=2)
    assert error_line(printed) == (
        f"cannot write to {run_dir}: No space left on device; make room there, or choose another --run_dir"
    )
    assert {**contents(run_dir), run_dir / "lock": b""} == before
    (small_disk / "filling").unlink()
    mhf("fit", *arguments(corpus, run_dir, "--trainer.max_steps", "2", "--ckpt_path", "auto"))
    assert (run_dir / "config-resume-1.yaml").stat().st_size > 1000


def test_a_configuration_that_cannot_be_written_is_named_and_not_left(tmp_path):
    (tmp_path / "config.yaml").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            ValueError, match=rf"^{tmp_path}/config-resume-1.yaml\S* could not be written: File too large"
        ):
            ResolvedConfig(tmp_path, "#" * 1001).on_train_start(None, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    resolved = ResolvedConfig(tmp_path, "a: 1\n")
    resolved.on_fit_start(None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    resolved.on_train_start(None, None)
    assert (tmp_path / "config-resume-1.yaml").read_text() == "a: 1\n"


@pytest.mark.slow
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(corpus, tmp_path):
    run_dir = tmp_path / "run"
    assert "Nothing was left" not in mhf("fit", *arguments(corpus, run_dir, "--trainer.max_steps", "2"))
    printed = mhf("fit", *arguments(corpus, run_dir, "--trainer.max_steps", "2", "--ckpt_path", "auto"))
    assert "Nothing was left to train: 2 of 2 steps are done. To go on, raise trainer.max_steps." in printed
    (run_dir / "lock").write_text("")
    before = {path: data for path, data in contents(run_dir).items() if path.parent.name != "tensorboard"}
    resume = ["--trainer.max_steps", "4", "--ckpt_path", "auto"]
    for more, why in (
        (["--model.optimizer.lr", "0.5"], "and this start has 0.5"),
        (["--trainer.max_steps", "1"], "Raise trainer.max_steps"),
        (["--trainer.fast_dev_run", "2"], "step-2 is at step 2; leave out --ckpt_path and give another --run_dir"),
    ):
        assert why in error_line(mhf("fit", *arguments(corpus, run_dir, *resume, *more), code=2))
        (run_dir / "lock").write_text("")
        # The logger has begun an event file by then; there is nothing in it.
        assert {path: data for path, data in contents(run_dir).items() if path.parent.name != "tensorboard"} == before


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--ckpt_path", "auto"]])
def test_a_trial_of_a_few_steps_writes_nothing(corpus, tmp_path, more):
    run_dir = tmp_path / "run"
    if more:
        mhf("fit", *arguments(corpus, run_dir, "--trainer.max_steps", "1"))
    before = contents(tmp_path)
    more = [*more, "--model.schedule.warmup_steps", "20", "--trainer.fast_dev_run", "2"]  # a trial ends before it
    printed = mhf("fit", *arguments(corpus, run_dir, *more))
    assert "max_steps=2` reached" in printed
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_brackets_in_a_path_are_no_markup(corpus, tmp_path, capsys):
    run_dir = tmp_path / "a[/b]" / "run [s1]"
    printed = mhf("fit", *arguments(corpus, run_dir, "--trainer.max_steps", "1"))
    assert f"--logdir {shlex.quote(str(run_dir))}\n" in printed
    assert runs_main([str(run_dir.parent)]) == 0
    assert "run [s1]" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    mhf("fit", *arguments(Path("~/data"), Path("~/run"), "--trainer.max_steps", "1"))
    assert (tmp_path / "run/checkpoints/step-1").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(corpus, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in error_line(mhf("fit", *arguments(corpus, tmp_path), code=2))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_one_line_with_the_way_out(corpus, tmp_path, name):
    error = error_line(mhf("fit", *arguments(corpus, tmp_path / "run", "--trainer.accelerator", name), code=2))
    assert "--trainer.accelerator cpu --trainer.precision 32-true" in error


@pytest.mark.slow
def test_what_lightning_refuses_is_one_line(corpus, tmp_path):
    error = error_line(mhf("fit", *arguments(corpus, tmp_path / "run", "--trainer.max_steps", "-5"), code=2))
    assert "`max_steps` must be" in error


@pytest.mark.parametrize(("begun", "raised"), [(False, ValueError), (True, MisconfigurationException)])
def test_what_lightning_refuses_during_training_keeps_its_traceback(begun, raised):
    def fit() -> None:
        if begun:
            trainer.callbacks[0].on_train_start(None, None)
        raise MisconfigurationException("no\n  such thing")

    trainer = SimpleNamespace(callbacks=[], fit=fit)
    cli: MHFCLI = MHFCLI.__new__(MHFCLI)
    cli.trainer = trainer
    with pytest.raises(raised, match=r"^no\n  such thing$" if begun else "^no such thing$"):
        cli.fit()


def test_one_process_trains_into_a_folder_again(tmp_path):
    run_dir = tmp_path / "run"
    for _ in range(2):
        lock_run_folder(run_dir)
    shutil.rmtree(run_dir)
    lock_run_folder(run_dir)
    with (run_dir / "lock").open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
