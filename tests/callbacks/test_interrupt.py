"""Ctrl-C in real `mhf fit` runs: the first saves and leaves, the second leaves; before the first step it ends them."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mhf_lightning.callbacks.preemption import EXIT_INTERRUPTED, EXIT_PREEMPTED
from mhf_lightning.checkpoint.folder import checkpoints
from mhf_lightning.data.prepare import prepare
from mhf_lightning.runs import HISTORY, read_run

pytestmark = [pytest.mark.slow, pytest.mark.serial]
ROOT = Path(__file__).parents[2]
SMALL = [
    *("--config", str(ROOT / "configs/model/flash_mhf.yaml")),
    *("--model.decoder.vocab_size", "300", "--model.decoder.d_model", "64", "--model.decoder.num_layers", "1"),
    *("--model.decoder.ffn.d_e", "32", "--model.schedule.warmup_steps", "2", "--trainer.limit_val_batches", "3"),
    *("--trainer.val_check_interval", "1000000", "--trainer.log_every_n_steps", "1", "--data.micro_batch_size", "4"),
    *("--checkpoint.every_n_steps", "1000000", "--ckpt_path", "auto"),
]
ONE_PROCESS = ["--config", str(ROOT / "configs/trainer/cpu.yaml"), "--data.num_workers", "2"]
TWO_PROCESSES = [
    *("--config", str(ROOT / "configs/trainer/fsdp2.yaml"), "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
    *("--trainer.precision", "32-true", "--trainer.strategy.init_args.data_parallel_size", "2"),
    *("--data.num_workers", "1"),
]
GO_ON = "to continue, give the same command with --ckpt_path auto"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sources = [str(path) for path in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))]
    prepare(sources, str(folder / "data"), context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
    return folder / "data"


class Fit:
    """`mhf fit` in a session of its own, at a terminal of its own or with its output in a file."""

    def __init__(self, run_dir: Path, corpus: Path, *args: str, terminal: bool = False) -> None:
        self.run_dir, self.printed = run_dir, b""
        if terminal:
            self.master, written_to = pty.openpty()
            fcntl.ioctl(written_to, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # without, there is no bar
        else:
            self.master, written_to = os.pipe()

        def at_the_terminal() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell may have started the tests with it ignored
            if terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        command = [sys.executable, "-m", "mhf_lightning.cli", "fit", *SMALL, "--data.path", str(corpus)]
        self.process = subprocess.Popen(
            [*command, "--run_dir", str(run_dir), *args],
            stdin=written_to if terminal else subprocess.DEVNULL,
            stdout=written_to,
            stderr=written_to,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=at_the_terminal,
        )
        os.close(written_to)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 65536):
                self.printed += data
        except OSError:
            pass  # what a terminal says when nobody is left at the other end

    @property
    def output(self) -> str:
        return self.printed.decode(errors="replace")

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.002)

    def history(self) -> list[dict]:
        path = self.run_dir / HISTORY
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def to_all(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def end(self, seconds: float = 60) -> int:
        """Return the exit code, when the whole group has ended."""
        try:
            code = self.process.wait(seconds)
            deadline = time.monotonic() + 30
            while self._group_is_there():
                assert time.monotonic() < deadline, f"processes are left\n{self.output}"
                time.sleep(0.01)
        finally:
            if self._group_is_there():
                os.killpg(self.process.pid, signal.SIGKILL)
        self.reader.join(10)
        return code

    def _group_is_there(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def fit(corpus, tmp_path):
    """Starts runs in one folder, and leaves none behind."""
    started: list[Fit] = []

    def start(*args: str, terminal: bool = False) -> Fit:
        started.append(Fit(tmp_path / "run", corpus, *args, terminal=terminal))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.to_all(signal.SIGKILL)
            run.process.wait()


def test_ctrl_c_in_a_terminal_saves_and_says_how_to_go_on(fit):
    """The terminal sends the signal, also to the loader's workers; the progress bar is on."""
    run = fit(*ONE_PROCESS, "--trainer.max_steps", "100000", terminal=True)
    run.wait_for(lambda: re.search(r"\b[2-9]/100000", run.output))
    os.write(run.master, b"\x03")
    assert run.end() == EXIT_INTERRUPTED, run.output
    assert "Ctrl-C: saving after this step" in run.output
    assert "Traceback" not in run.output
    assert run.output.rstrip().splitlines()[-1] == GO_ON
    (step,) = checkpoints(run.run_dir / "checkpoints")
    assert f"asked to stop: step {step} is saved" in run.output
    assert step < 100000
    end = run.history()[-1]
    assert (end["event"], end["step"], end["reason"]) == ("end", step, "preempted")
    assert read_run(run.run_dir).state == "preempted"

    after = fit(*ONE_PROCESS, "--trainer.max_steps", str(step + 2))
    assert after.end() == 0, after.output
    assert [line["step"] for line in after.history() if line["event"] == "start"] == [0, step]
    assert max(checkpoints(run.run_dir / "checkpoints")) == step + 2


def test_ctrl_c_saves_though_nobody_reads_the_output_any_more(fit):
    """Ctrl-C in `mhf fit | tee` ends tee too."""
    run = fit(*ONE_PROCESS, "--trainer.max_steps", "100000")
    run.wait_for(lambda: "step 3/" in run.output)
    os.dup2(os.open(os.devnull, os.O_RDONLY), run.master)
    run.to_all(signal.SIGINT)
    assert run.end() == EXIT_INTERRUPTED
    (step,) = checkpoints(run.run_dir / "checkpoints")
    assert (run.history()[-1]["step"], run.history()[-1]["reason"]) == (step, "preempted")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_PREEMPTED)], ids=["SIGINT", "SIGTERM"]
)
def test_processes_that_lightning_started_save_the_same_step(fit, number, code):
    run = fit(*TWO_PROCESSES, "--trainer.max_steps", "100000")
    run.wait_for(lambda: "step 3/" in run.output)
    run.to_all(number)
    assert run.end() == code, run.output
    assert "Traceback" not in run.output
    assert "Forcefully terminating" not in run.output
    assert run.output.count("Ctrl-C: saving") == (number == signal.SIGINT)
    if number == signal.SIGINT:
        assert run.output.rstrip().splitlines()[-1] == GO_ON
    (step,) = checkpoints(run.run_dir / "checkpoints")
    after = fit(*TWO_PROCESSES, "--trainer.max_steps", str(step + 2))
    assert after.end() == 0, after.output
    assert [line["step"] for line in after.history() if line["event"] == "start"] == [0, step]


@pytest.mark.parametrize("processes", [ONE_PROCESS, TWO_PROCESSES], ids=["one process", "two processes"])
def test_the_second_leaves_at_once(fit, processes):
    """In a step that takes some seconds."""
    run = fit(*processes, "--trainer.max_steps", "100000", "--trainer.accumulate_grad_batches", "500")
    run.wait_for(lambda: "step 1/" in run.output)
    run.to_all(signal.SIGINT)
    run.wait_for(lambda: "Ctrl-C: saving" in run.output)
    run.to_all(signal.SIGINT)
    assert run.end() == 1, run.output
    assert "Detected KeyboardInterrupt" in run.output
    assert checkpoints(run.run_dir / "checkpoints") == {}
    assert run.history()[-1]["reason"].startswith("error: KeyboardInterrupt")


def test_in_the_import_it_ends_the_process_in_one_line():
    code = """
import sys
class Interrupted:
    @staticmethod
    def find_spec(name, *_):
        if name == "mhf_lightning.training.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted)
from mhf_lightning.cli import main
main(["fit"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "mhf: interrupted before anything was begun\n")


@pytest.mark.parametrize("processes", [ONE_PROCESS, TWO_PROCESSES], ids=["one process", "two processes"])
def test_before_the_first_step_is_done_it_ends_the_run(fit, processes):
    """In a step that would take an hour."""
    run = fit(*processes, "--trainer.max_steps", "100000", "--trainer.accumulate_grad_batches", "1000000")
    run.wait_for(run.history)
    run.to_all(signal.SIGINT)
    assert run.end(20) == 1, run.output
    assert "Ctrl-C" not in run.output
    assert "DataLoader worker" not in run.output
    assert checkpoints(run.run_dir / "checkpoints") == {}
