"""The list of runs: what is started when, pieces that continue exactly, what comes back."""

import json
import signal
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
from tiny_packages import CONTEXT_LENGTH

from mhf_lightning.callbacks.preemption import EXIT_PREEMPTED
from mhf_lightning.cli import main
from mhf_lightning.evidence import queue as module
from mhf_lightning.evidence.queue import PACK, Runner, expected_seconds, read_queue
from mhf_lightning.evidence.summary import read_runs
from mhf_lightning.report.events import read_events

STEPS = 200
RECIPE = f"""
trainer: {{accelerator: cpu, max_steps: {STEPS}, val_check_interval: 50, num_sanity_val_steps: 0, log_every_n_steps: 10,
          enable_progress_bar: false, limit_val_batches: 2}}
data: {{path: none, micro_batch_size: 4}}
model: {{schedule: {{warmup_steps: 10}}}}
checkpoint: {{every_n_steps: {STEPS}}}
"""
MODEL = """
model:
  decoder:
    vocab_size: 16384
    d_model: 16
    num_layers: 1
    num_attention_heads: 2
    ffn: {name: swiglu, d_ff: 16}
"""
HEADER = "size,variant,lr,seed,state,seconds\n"


@pytest.fixture
def queue(tmp_path):
    """Two equal models under two names."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/recipe.yaml").write_text(RECIPE)
    for name in ("cut", "whole"):
        (tmp_path / f"tiny/{name}.yaml").write_text(MODEL)
    (tmp_path / "queue.csv").write_text(HEADER + "tiny,cut,1e-2,7,,\ntiny,whole,1e-2,7,,\n")
    return tmp_path / "queue.csv"


@pytest.fixture
def runner(queue, corpus, monkeypatch):
    monkeypatch.setenv("MHF_COMMIT", "0123456789abcdef")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as of those that are forked: more add up in another order
    return lambda: Runner(queue, corpus / "data", queue.parent / "runs", queue.parent / "out", [""])


class Forked:
    """A process as the runner sees it, forked from one that has imported everything."""

    def __init__(self, command, env, stdout, stderr):
        assert command[1:3] == ["-m", "mhf_lightning.cli"]
        self.process = forked.start(command[3:], Path.cwd(), env, (stdout.name, stderr.name))
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode


def states(queue) -> dict[str, str]:
    return {row.variant: row.state for row in read_queue(queue)}


@pytest.mark.slow
def test_a_run_cut_into_pieces_ends_like_one_that_was_not(queue, runner, monkeypatch):
    history = queue.parent / "runs/tiny/cut/lr1e-2-seed7/history.jsonl"
    clock = time.monotonic

    def time_is_up_after_the_first_steps() -> float:
        return clock() + 600 * (history.exists() and "progress" in history.read_text())

    monkeypatch.setattr(module, "NOTICE_SECONDS", 500.0)
    monkeypatch.setattr(module.time, "monotonic", time_is_up_after_the_first_steps)
    assert runner().work(1000.0)
    monkeypatch.undo()
    assert states(queue) == {"cut": "cut", "whole": ""}
    assert read_queue(queue.parent / "out/queue.csv") == read_queue(queue)
    left = json.loads(history.read_text().splitlines()[-1])
    assert left["reason"] == "preempted"
    assert 0 < left["step"] < STEPS

    monkeypatch.setenv("MHF_COMMIT", "0123456789abcdef")
    monkeypatch.setattr(module.subprocess, "Popen", Forked)
    assert runner().work(1000.0, whole=True)
    assert states(queue) == {"cut": "done", "whole": "done"}
    with tarfile.open(queue.parent / "out" / PACK) as archive:
        archive.extractall(queue.parent / "back", filter="data")
    cut, whole = (read_events(queue.parent / f"back/tiny/{name}/lr1e-2-seed7/tensorboard") for name in ("cut", "whole"))
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert cut.scalars[tag].steps == whole.scalars[tag].steps
        assert cut.scalars[tag].values == whole.scalars[tag].values

    runs = read_runs([queue.parent / "out" / PACK])
    assert [(run.size, run.variant, run.lr, run.seed) for run in runs] == [
        ("tiny", "cut", 0.01, 7),
        ("tiny", "whole", 0.01, 7),
    ]
    for run in runs:
        assert run.finished
        assert run.steps == STEPS
        assert run.loss == whole.scalars["val/loss"].values[-1]
        assert run.tokens == STEPS * 4 * CONTEXT_LENGTH
        assert (run.gpu, run.commit) == ("cpu", "0123456789ab")
        assert "--config" in run.command
        assert len(run.curve["loss"]) == STEPS // 50


HOUR = 3600.0


@pytest.fixture
def listed(tmp_path, corpus, monkeypatch):
    """A runner of two devices that starts nothing, with a list of rows ``size,variant,state,seconds``."""
    monkeypatch.setenv("MHF_COMMIT", "0123456789abcdef")

    def make(*rows: str) -> Runner:
        lines = (row.split(",") for row in rows)
        text = "".join(
            f"{size},{variant},1,{n},{state},{took}\n" for n, (size, variant, state, took) in enumerate(lines)
        )
        (tmp_path / "queue.csv").write_text(HEADER + text)
        return Runner(tmp_path / "queue.csv", corpus / "data", tmp_path / "runs", tmp_path / "out", ["0", "1"])

    return make


def chosen(runner: Runner, left: float, unknown: float | None = None) -> str | None:
    row = runner._next([], left, unknown)
    return row and row.variant


def test_runs_begin_in_their_order_while_there_is_time_to_start(listed):
    runner = listed("a,x,done,100", "b,z,,", "a,x,,")
    assert chosen(runner, 60) == "z"
    assert chosen(runner, 59) is None


def test_where_folders_are_lost_a_run_begins_if_a_whole_one_fits(listed):
    runner = listed("a,x,done,100", "a,x,done,120", "a,y,done,50", "b,z,,", "a,x,,", "a,y,,", "a,new,,", "a,y2,cut,300")
    assert [expected_seconds(row, runner.rows, 432) for row in runner.rows[3:]] == [432, 120, 50, 120, 375]
    assert chosen(runner, 432, unknown=432) == "z"  # nobody knows how long it takes
    assert chosen(runner, 431, unknown=432) == "x"
    assert chosen(runner, 119, unknown=432) == "y"
    assert chosen(runner, 49, unknown=432) is None


def test_a_run_that_was_cut_goes_on_where_its_folder_is(listed, tmp_path):
    runner = listed("a,x,done,100", "a,x2,cut,70", "a,y,failed,3")
    assert chosen(runner, 99, unknown=432) is None
    (tmp_path / "runs/a/x2/lr1-seed1/checkpoints").mkdir(parents=True)
    assert chosen(runner, 99, unknown=432) == "x2"


@pytest.mark.parametrize(
    ("whole", "takes", "states", "ends"),
    [
        (True, 200, ["done"] * 4, 400),
        (True, 300, ["done", "done", "", ""], 300),  # 180 s are left, and no other run fits
        (False, 300, ["done", "done", "cut", "cut"], 480),
        (True, 600, ["cut", "cut", "", ""], 480),  # nobody could know
    ],
)
def test_what_a_call_of_500_seconds_begins_on_two_devices(listed, monkeypatch, whole, takes, states, ends):
    now = 0.0

    class Process:
        def __init__(self, *_, **__):
            self.ends, self.code = now + takes, 0

        def poll(self) -> int | None:
            return self.code if now >= self.ends else None

        def send_signal(self, number):
            assert number == signal.SIGUSR1
            self.ends, self.code = now, EXIT_PREEMPTED

    def sleep(_):
        nonlocal now
        now += 10

    runner = listed(*(f"b,run{i},," for i in range(4)))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(module.subprocess, "Popen", Process)
    assert runner.work(500.0, whole)
    assert [row.state for row in runner.rows] == states
    assert now == pytest.approx(ends, abs=10)
    if takes > 500:  # the next call leaves these two alone
        assert chosen(runner, 480, unknown=432) == "run2"


class Ending:
    """A process that has ended, with a code."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


def test_states_by_how_a_process_ends_and_an_end_to_failures(listed, monkeypatch, capfd):
    runner = listed(*(f"a,run{i},," for i in range(8)))
    codes = iter([0, 75, -signal.SIGKILL, 1, 2, -signal.SIGSEGV])
    devices = []

    def start(command, env, stdout, stderr):
        devices.append(env["CUDA_VISIBLE_DEVICES"])
        assert env["MHF_COMMIT"] == "0123456789ab"
        assert env["MHF_COMMAND"].startswith("mhf fit --config ")
        return Ending(next(codes))

    monkeypatch.setattr(module.subprocess, "Popen", start)
    assert not runner.work(HOUR)
    assert [row.state for row in read_queue(runner.queue)] == [
        "done",
        "cut",
        "cut",
        "failed",
        "failed",
        "failed",
        "",
        "",
    ]
    assert devices == ["0", "1"] * 3
    assert "a/run4/lr1-seed4: exit code 2" in capfd.readouterr().out


class Going(Ending):
    """A process that goes on until it is told to end."""

    def terminate(self) -> None:
        self.code = -signal.SIGTERM


def test_an_error_leaves_no_process_behind(listed, monkeypatch):
    runner = listed("a,x,,", "a,y,,")
    processes = [Going(None), Ending(0)]
    started = iter(processes)
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **__: next(started))
    runner.out.write_text("no folder")
    with pytest.raises(FileExistsError):
        runner.work(HOUR)
    assert processes[0].code == -signal.SIGTERM


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size,variant\n", "has the columns"),
        (HEADER + "a,x,1,1,Done,5\n", "a, x, 1, 1, Done, 5 is no line of size, .*; state cut, done, failed or empty"),
        (HEADER + "a,x,1,1,done,5,6\n", "is no line of"),
        (HEADER + "a,x,1,1,done,fast\n", "is no line of"),
        (HEADER + "a,x,1,1\na,x,1,1,done,5\n", "a/x/lr1-seed1 more than once"),
        (None, "does not exist; give the list"),
    ],
)
def test_a_list_that_cannot_be_worked_off_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "queue.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queue(tmp_path / "queue.csv")


def test_the_commit_must_be_known(listed, monkeypatch):
    monkeypatch.setattr(module, "commit", lambda: None)
    with pytest.raises(ValueError, match="set MHF_COMMIT"):
        listed("a,x,,")


def test_the_command_ends_well_where_nothing_is_left(listed, corpus, tmp_path, capfd):
    listed("a,x,done,5")

    def run(data) -> int:
        files = ["--queue", str(tmp_path / "queue.csv"), "--out", str(tmp_path / "out"), "--data", str(data)]
        with pytest.raises(SystemExit) as end:
            main(["evidence", "run", "--seconds", "30", *files])
        return end.value.code

    assert run(corpus / "data") == 0
    assert run(tmp_path / "nowhere") == 2
    assert "make it with: mhf evidence corpus" in capfd.readouterr().err
