"""Starts groups of gloo processes that do many things each (see ``worker.py`` and ``cli_worker.py``)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Results = list[dict[str, dict[str, Any]]]


def run_processes(script: str, orders: Any, world: int, folder: Path, timeout: float = 1200) -> Results:
    """Run ``python SCRIPT ORDERS.json FOLDER`` with torchrun's variables; return what each rank left in its JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orders.json").write_text(json.dumps(orders))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank)},
            **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "NODE_RANK": "0"},
            **{"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        }
        command = [sys.executable, str(HERE / script), str(folder / "orders.json"), str(folder)]
        with (folder / f"log{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world, "\n".join((folder / f"log{rank}.txt").read_text()[-3000:] for rank in range(world))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def run_cases(cases: dict[str, dict[str, Any]], world: int, folder: Path) -> Results:
    """Train every case on ``world`` processes; return one dict of results by case for each rank.

    A case has ``strategy`` and may have steps, accumulate, ffn, num_kv_heads, tie_embeddings, grad_clip, precision,
    module (arguments of PretrainModule), poison (steps, rank, what, and fused: AdamW as on a GPU).
    """
    return run_processes("worker.py", cases, world, folder)
