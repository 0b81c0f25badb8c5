"""Run folders with known contents, their event files written by TensorBoard's own writer, and the `mhf` command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

START = 1_700_000_000.0
# One red pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
Point = tuple[str, int, Any]  # tag, step, scalar or image


def mhf(*args: str, code: int = 0) -> str:
    """Run `python -m mhf_lightning.cli`; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "mhf_lightning.cli", *args], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_events(folder: Path, points: list[Point], *, number: int = 0, purge: int | None = None) -> Path:
    """Write the ``number``-th event file of a folder; a point of step s is written s seconds after ``START``."""
    events = [Event(wall_time=START, file_version="brain.Event:2")]
    if purge is not None:
        events.append(Event(step=purge, wall_time=START, session_log=SessionLog(status=SessionLog.START)))
    for tag, step, value in points:
        if isinstance(value, bytes):
            entry = Summary.Value(tag=tag, image=Summary.Image(width=1, height=1, encoded_image_string=value))
        else:
            entry = Summary.Value(tag=tag, simple_value=value)
        events.append(Event(step=step, wall_time=START + step, summary=Summary(value=[entry])))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{number:010}.host"
    with path.open("xb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
    return path


def write_evaluation(run_dir: Path, name: str, results: dict[str, Any], step: int = 20) -> Path:
    """Write a file as `mhf eval` does."""
    path = run_dir / "eval" / f"{name}-step-{step}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"kind": "tasks", "name": name, "step": step, "results": results}))
    return path


def write_run(run_dir: Path, *, steps: int = 20, scale: float = 1.0, config: str = "model: {width: 8}\n") -> Path:
    """Write history, configuration and every tag that the report reads; losses are ``scale * (10 - step / 10)``."""
    points: list[Point] = []
    for step in range(steps):
        loss = scale * (10 - step / 10)
        points += [
            ("train/loss", step, loss),
            ("train/perplexity", step, 2**loss),
            ("train/tokens", step, 100.0 * (step + 1)),
        ]
        points += [("throughput/flops", step, 1e9 * (step + 1)), ("memory/peak_gib", step, scale * (1 + step / 100))]
        points += [("throughput/tokens_per_s_average", step, 500 * scale), ("throughput/mfu", step, 0.25 * scale)]
        points += [("memory/peak_in_forward_gib", step, 0.5), ("memory/peak_in_backward_gib", step, 0.75)]
        points += [("time/forward", step, 0.25), ("time/backward", step, 0.75)]
        if step % 10 == 9:
            points += [("val/loss", step, loss + 1), ("val/perplexity", step, 2 ** (loss + 1))]
            points += [("router/entropy_token/mean", step, 0.875)]
            image = PNG if step == steps - 1 else b"an older one"
            points += [("router/load/layer_10", step, image), ("router/load/layer_9", step, image)]
    write_events(run_dir / "tensorboard", points)
    (run_dir / "config.yaml").write_text(config)
    start = {"event": "start", "time": START, "process_start": START, "step": 0, "tokens": 0, "max_steps": steps}
    start |= {"job_id": None, "parameters": {"total": 1_234_567, "non_embedding": 1_000_000}}
    done = {"time": START + steps, "step": steps, "tokens": 100 * steps}
    lines = [start, {"event": "progress", "loss": 1.0, "tokens_per_s": 1.0, **done}]
    lines += [{"event": "checkpoint", **done}, {"event": "end", "reason": "completed", **done}]
    (run_dir / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run_dir
