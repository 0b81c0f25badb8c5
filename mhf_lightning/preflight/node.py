"""What a node can say of itself."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30
# Compiled kernels and temporary files; what loader workers and NCCL share (containers often get 64 MiB by default).
MIN_TMP_GIB = 1.0
MIN_SHM_GIB = 1.0
NVIDIA_SMI_SECONDS = 30.0
# nvidia-smi prints "[N/A]" or "[Not Supported]" for what a GPU lacks.
FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "ecc_errors": "ecc.errors.uncorrected.volatile.total",
    "sm_clock": "clocks.sm",
    "max_sm_clock": "clocks.max.sm",
    "hw_slowdown": "clocks_throttle_reasons.hw_slowdown",
}


@dataclass
class Node:
    """A node's own report.

    Attributes:
        host: Its name.
        gpus: For each GPU that nvidia-smi lists: ``FIELDS`` as it prints them; clocks in MHz.
        torch_gpus: Number of GPUs that torch sees.
        run_dir_gib: Free disk where the run is to be written.
        tmp_gib: Free disk for temporary files.
        shm_gib: Size of /dev/shm.
        problems: What is wrong here, one sentence each.
    """

    host: str
    gpus: list[dict[str, str]] = field(default_factory=list)
    torch_gpus: int = 0
    run_dir_gib: float = 0.0
    tmp_gib: float = 0.0
    shm_gib: float = 0.0
    problems: list[str] = field(default_factory=list)


def check_node(run_dir: Path, min_free_gib: float) -> Node:
    """Look at this node.

    Args:
        run_dir: Where the run is to be written; the nearest folder above it that exists counts.
        min_free_gib: Free disk that it needs there.
    """
    import torch

    node = Node(socket.gethostname())
    try:
        node.gpus = list_gpus()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        node.problems.append(f"nvidia-smi failed: {error}")
    node.torch_gpus = torch.cuda.device_count()
    if node.gpus and not node.torch_gpus:
        node.problems.append(f"nvidia-smi lists {len(node.gpus)} GPUs, torch sees none")
    for i, gpu in enumerate(node.gpus):
        if gpu["ecc_errors"].isdigit() and int(gpu["ecc_errors"]):
            node.problems.append(f"GPU {i} has {gpu['ecc_errors']} uncorrected ECC errors")
        if gpu["hw_slowdown"] == "Active":
            node.problems.append(f"GPU {i} is slowed down by its hardware (heat or power)")
    run_dir = run_dir.absolute()
    while not run_dir.exists():
        run_dir = run_dir.parent
    tmp, shm = Path(tempfile.gettempdir()), Path("/dev/shm")
    node.run_dir_gib, node.tmp_gib = shutil.disk_usage(run_dir).free / GIB, shutil.disk_usage(tmp).free / GIB
    node.shm_gib = shutil.disk_usage(shm).total / GIB if shm.exists() else 0.0
    for what, found, needed in (
        (f"free in {run_dir}", node.run_dir_gib, min_free_gib),
        (f"free in {tmp}", node.tmp_gib, MIN_TMP_GIB),
        (f"the size of {shm}", node.shm_gib, MIN_SHM_GIB),
    ):
        if found < needed:
            node.problems.append(f"{found:.2f} GiB are {what}, {needed:g} GiB are needed")
    return node


def list_gpus() -> list[dict[str, str]]:
    """Return ``FIELDS`` of each GPU; none where there is no nvidia-smi.

    Raises:
        subprocess.SubprocessError: nvidia-smi failed, or hangs.
        ValueError: It printed something else.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_SECONDS)
    if done.returncode:
        raise subprocess.SubprocessError((done.stdout + done.stderr).strip() or f"exit code {done.returncode}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]
