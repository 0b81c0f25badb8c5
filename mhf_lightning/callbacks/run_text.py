"""What was run, as text in TensorBoard: configuration, state of the code, and an environment without secrets."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from mhf_lightning.redaction import redact, redact_yaml

# Environment variables that are shown; all others are not looked at.
ALLOWED = re.compile(
    r"SLURM_(JOB_ID|JOB_NAME|JOB_NUM_NODES|JOB_PARTITION|NNODES|NTASKS|NTASKS_PER_NODE|RESTART_COUNT)"
    r"|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_MAX_CONNECTIONS|OMP_NUM_THREADS|MKL_NUM_THREADS|WORLD_SIZE"
    r"|(MHF|NCCL|PYTORCH|TORCHINDUCTOR|TRITON)_\w+"
)
PACKAGES = ("torch", "triton", "lightning", "deepspeed", "mhf-lightning")


class RunText(Callback):
    """Writes ``run/config``, ``run/git`` and ``run/environment`` at each start, once, on rank 0."""

    def __init__(self, config: str) -> None:
        """Keep the configuration.

        Args:
            config: Resolved, as YAML.
        """
        self.config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        if not trainer.is_global_zero:
            return
        texts = {
            "run/config": f"```yaml\n{redact_yaml(self.config)}```",
            "run/git": git_state(Path(__file__).parent),
            "run/environment": table(environment(os.environ)),
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for tag, text in texts.items():
                    logger.experiment.add_text(tag, text, trainer.global_step)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return versions, devices and the allowed environment variables, redacted."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found | {name: redact(name, variables[name]) for name in sorted(variables) if ALLOWED.fullmatch(name)}


def git_state(folder: Path) -> str:
    """Return commit, branch and changed files of the checkout that holds a folder, as Markdown."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.rstrip()

    try:
        commit, branch = git("rev-parse", "HEAD"), git("rev-parse", "--abbrev-ref", "HEAD")
        changed = git("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return "n/a: not a git checkout"
    changes = f"```\n{changed}\n```" if changed else "no changes"
    return f"commit `{commit}` on `{branch}`\n\n{changes}"


def table(values: Mapping[str, str]) -> str:
    """Return a Markdown table of two columns."""
    rows = [f"| {name} | `{value}` |" for name, value in values.items()]
    return "\n".join(["| name | value |", "|---|---|", *rows])
