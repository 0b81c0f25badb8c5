"""Histories written by hand, with known answers; torn and damaged ones; folders of many kinds. No run is started."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mhf_lightning.runs import HISTORY, find_runs, read_history, read_run
from mhf_lightning.runs.cli import main


def start(at: float, step: int, process_start: float, **more) -> dict:
    fields = {"tokens": 64 * step, "max_steps": 100, "job_id": "7", "restart": 0, "world_size": 1, "hosts": ["a"]}
    parameters = {"parameters": {"total": 10, "non_embedding": 4}}
    return {"event": "start", "time": at, "step": step, "process_start": process_start, **fields, **parameters, **more}


def progress(at: float, step: int, loss: float | None = 2.0) -> dict:
    return {"event": "progress", "time": at, "step": step, "tokens": 64 * step, "loss": loss, "tokens_per_s": 500.0}


def checkpoint(at: float, step: int, committed: float | None = None) -> dict:
    """Of a step done ``at`` a time."""
    return {"event": "checkpoint", "time": committed or at, "step": step, "tokens": 64 * step, "done": at}


def validation(at: float, step: int, perplexity: float) -> dict:
    return {"event": "validation", "time": at, "step": step, "loss": 1.0, "perplexity": perplexity}


def end(at: float, step: int, reason: str) -> dict:
    return {"event": "end", "time": at, "step": step, "tokens": 64 * step, "reason": reason}


def write(run_dir: Path, *events: dict | str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    (run_dir / HISTORY).write_text("".join(line + "\n" for line in lines))
    return run_dir


# Process 90..100 starts; 100..150 useful until step 20 was done; killed at step 28. Process 200..220 starts at 20;
# 220..300 useful until step 50; preempted. The third process resumes at 50, at 420, and ends at 500.
FIRST = [start(100, 0, 90), progress(105, 1), checkpoint(125, 10), checkpoint(150, 20), progress(170, 28, 1.9)]
SECOND = [
    start(220, 20, 200),
    progress(225, 21),
    validation(290, 48, 9.0),
    checkpoint(300, 50),
    end(302, 50, "preempted"),
]
THIRD = [start(420, 50, 400, job_id="8"), progress(425, 51), validation(490, 100, 7.5), progress(491, 100, 1.5)]
THIRD += [checkpoint(491.5, 100), end(500, 100, "completed")]


def test_goodput_of_three_starts(tmp_path):
    run = read_run(write(tmp_path, *FIRST, *SECOND, *THIRD))
    assert run.goodput == pytest.approx((50 + 80 + 70) / 410)  # step 100 was done by its validation's end, at 490
    assert (run.state, run.restarts, run.job_id, run.step, run.max_steps) == ("completed", 2, "8", 100, 100)
    assert (run.tokens, run.loss, run.perplexity, run.tokens_per_s) == (6400, 1.5, 7.5, 500.0)
    assert run.parameters == {"total": 10, "non_embedding": 4}
    assert [begun["step"] for begun in run.starts] == [0, 20, 50]
    assert (run.reason, run.damage) == (None, None)


@pytest.mark.parametrize(
    ("events", "useful", "wall"),
    [
        (FIRST, 50, 80),  # killed: what no checkpoint holds is lost
        ([*FIRST, *SECOND], 50 + 80, 212),
        ([*FIRST[:2], end(130, 3, "error: ValueError: no")], 0, 40),
        # A checkpoint turned out damaged: the second start goes back to 10, and 20 of the first is lost.
        ([*FIRST, start(220, 10, 200), end(230, 10, "preempted")], 25, 140),
        # The same, killed before a checkpoint of its own: what it did is lost, although there was a step 20 once.
        ([*FIRST, start(220, 10, 200), progress(240, 15), end(250, 16, "error: ValueError: no")], 25, 160),
        # Steps done while a checkpoint is being written, and those after it, are lost.
        ([FIRST[0], progress(130, 12), checkpoint(125, 10, 140), progress(150, 14), end(155, 14, "preempted")], 25, 65),
        # Two starts that got nowhere, then one from the first's checkpoint.
        (
            [*FIRST, start(220, 20, 200), start(320, 20, 300), progress(330, 21), end(340, 30, "completed")],
            50 + 10,
            250,
        ),
        # Step 20 is done again by the second start, and the third begins there.
        ([*FIRST, start(220, 10, 200), checkpoint(260, 20), start(320, 20, 300), end(330, 20, "preempted")], 65, 240),
    ],
)
def test_goodput(tmp_path, events, useful, wall):
    run_dir = write(tmp_path, *events)
    assert read_run(run_dir, now=time.time() + 3600).goodput == pytest.approx(useful / wall)


def test_the_last_start_of_a_running_run_counts_in_full(tmp_path):
    run = read_run(write(tmp_path, *FIRST))
    assert run.state == "running"
    assert run.goodput == pytest.approx(70 / 80)


def test_state_follows_the_last_writing(tmp_path):
    run_dir = write(tmp_path, *FIRST)
    beat = run_dir / "heartbeat/rank-0"
    beat.parent.mkdir()
    beat.write_text("28 0\n")
    for path in (run_dir, run_dir / HISTORY, beat):
        os.utime(path, (1000, 1000))
    assert read_run(run_dir, now=1000 + 590).state == "running"
    assert read_run(run_dir, now=1000 + 610).state == "lost"
    os.utime(beat, (1100, 1100))
    assert read_run(run_dir, now=1000 + 610).state == "running"
    assert read_run(write(tmp_path, *FIRST, end(171, 28, "preempted")), now=1e9).state == "preempted"
    assert read_run(write(tmp_path, *FIRST, end(171, 28, "stopped")), now=1e9).state == "stopped"
    failed = read_run(write(tmp_path, *FIRST, end(171, 28, "error: OSError: disk gone")), now=1e9)
    assert (failed.state, failed.reason) == ("failed", "OSError: disk gone")
    assert read_run(write(tmp_path, *FIRST, end(171, 28, "preempted"), start(200, 28, 190))).state == "running"


def test_what_a_resume_undid_is_not_reported(tmp_path):
    run = read_run(write(tmp_path, *FIRST, validation(171, 28, 3.0), start(220, 20, 200)))
    assert (run.step, run.tokens, run.perplexity) == (20, 1280, None)
    assert run.loss == 2.0  # of step 1, the last that still stands


def test_a_checkpoint_is_written_down_steps_later(tmp_path):
    run = read_run(write(tmp_path, FIRST[0], progress(130, 12), checkpoint(125, 10, 140)))
    assert (run.step, run.tokens, run.tokens_per_s) == (12, 12 * 64, 500.0)


def test_the_first_histories_do_not_tell_when_a_checkpoint_was_committed(tmp_path):
    events = [{key: value for key, value in event.items() if key != "done"} for event in [*FIRST, *SECOND, *THIRD]]
    assert read_run(write(tmp_path, *events)).goodput == pytest.approx((50 + 80 + 70) / 410)


def test_a_last_line_torn_at_any_byte_hides_nothing(tmp_path):
    """Cut by a kill, then read; and then continued by the real writer."""
    from mhf_lightning.callbacks.history import append_line

    for last in (checkpoint(150, 20), end(151, 20, "error: ValueError: ä")):
        whole = json.dumps(last, ensure_ascii=False).encode() + b"\n"
        before = write(tmp_path, *FIRST[:3]).joinpath(HISTORY).read_bytes()
        for cut in range(len(whole) + 1):
            (tmp_path / HISTORY).write_bytes(before + whole[:cut])
            complete = [last] if cut >= len(whole) - 1 else []  # only its newline may be missing
            assert read_history(tmp_path / HISTORY) == ([*FIRST[:3], *complete], None)
            file = os.open(tmp_path / HISTORY, os.O_RDWR | os.O_APPEND)
            append_line(file, SECOND[0])
            append_line(file, SECOND[1])
            os.close(file)
            assert read_history(tmp_path / HISTORY) == ([*FIRST[:3], *complete, *SECOND[:2]], None)


@pytest.mark.parametrize(
    ("events", "damage"),
    [
        ([FIRST[0], '{"event": "progress", "ti', FIRST[1]], "line 2 is no JSON object"),
        ([FIRST[0], "[1, 2]", FIRST[1]], "line 2 is no JSON object"),
        (["\0" * 40, FIRST[1]], "line 1 is no JSON object"),
        (["[" * 100_000, FIRST[1]], "line 1 is no JSON object"),
        ([FIRST[0], {**FIRST[1], "step": "1"}], "line 2 has no valid 'step'"),
        ([FIRST[0], {**FIRST[1], "loss": [1]}], "line 2 has no valid 'loss'"),
        ([{"event": "start", "time": 1}], "line 1 has no valid 'process_start'"),
        ([FIRST[0], {**end(3, 1, "completed"), "reason": None}], "line 2 has no valid 'reason'"),
    ],
)
def test_damage_is_named(tmp_path, capsys, events, damage):
    write(tmp_path / "bad", *events)
    write(tmp_path / "good", *FIRST, *SECOND, *THIRD)
    assert read_run(tmp_path / "bad").damage == f"{HISTORY}: {damage}"
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"bad: damaged: {HISTORY}: {damage}" in shown
    assert "completed" in shown


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / HISTORY).write_bytes(b'\xff\xfe\n{"event": "progress"}\n')
    assert read_run(tmp_path).damage == f"{HISTORY}: line 1 is no JSON object"


def test_unknown_events_and_fields_are_ignored(tmp_path):
    events, damage = read_history(write(tmp_path, {"event": "new"}, {**FIRST[0], "more": 1}, "", "{}") / HISTORY)
    assert (len(events), damage) == (1, None)


def test_a_run_from_before_there_were_histories(tmp_path):
    run_dir = tmp_path / "old"
    committed = run_dir / "checkpoints/step-20"
    for folder in (committed, run_dir / "checkpoints/step-9", run_dir / "checkpoints/step-30.tmp"):
        folder.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("trainer:\n  max_steps: 40\n")
    (committed / "manifest.json").write_text('{"about": {"tokens_seen": 1280}}')
    run = read_run(run_dir)
    assert (run.state, run.step, run.max_steps, run.tokens) == ("running", 20, 40, 1280)
    assert run.last_checkpoint == committed
    assert read_run(run_dir, now=time.time() + 3600).state == "lost"
    (run_dir / "config.yaml").write_text("trainer:\n  max_steps: 20\n")
    assert read_run(run_dir, now=time.time() + 3600).state == "completed"
    (run_dir / "config.yaml").write_text("a: [")
    assert read_run(run_dir).max_steps is None


def test_runs_are_found_at_any_depth_and_through_links(tmp_path):
    elsewhere = write(tmp_path / "elsewhere/c", *FIRST)
    top = tmp_path / "runs"
    write(top / "a/b", *FIRST)
    write(top / "d", *FIRST)
    write(top / "d/code/inside", *FIRST)  # belongs to d
    (top / "empty").mkdir()
    (top / "linked").symlink_to(elsewhere)
    (top / "loop").symlink_to(top)
    assert find_runs(top) == [top / "a/b", top / "d", top / "linked"]
    assert find_runs(top / "d") == [top / "d"]


def test_json_and_empty_and_missing_folders(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert (
        capsys.readouterr().out == f"no runs in {tmp_path}: a run is a folder that holds history.jsonl or config.yaml\n"
    )
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main([str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    write(tmp_path / "a", *FIRST, *SECOND, *THIRD)
    assert main([str(tmp_path), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["run_dir"], shown["state"], shown["restarts"]) == (str(tmp_path / "a"), "completed", 2)


def test_the_command_imports_neither_torch_nor_lightning(tmp_path):
    write(tmp_path / "a", *FIRST, *SECOND, *THIRD)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.yaml").write_text("trainer:\n  max_steps: 40\n")
    code = (
        "import sys, mhf_lightning.cli\n"
        "try:\n    mhf_lightning.cli.main(['runs', sys.argv[1]])\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("│ a "))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["a", "completed", "8", "100 / 100", "6,400", "1.5000", "7.50", "500", "2", "48.8%", "-"]
