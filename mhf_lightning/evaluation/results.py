"""Results in the run folder, ``eval/NAME-step-N.json``, and in TensorBoard, ``eval/NAME/METRIC`` at N - 1."""

from __future__ import annotations

import json
import math
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from mhf_lightning.checkpoint.trained import Trained

Results = dict[str, dict[str, float]]  # by task or text, then metric


def write_results(
    trained: Trained, kind: str, name: str, results: Results, details: dict[str, Any] | None = None
) -> Path | None:
    """Write results beside the run's checkpoints; a file of the same name is replaced.

    Args:
        trained: What was evaluated.
        kind: ``tasks`` or ``perplexity``.
        name: Of the file.
        results: By task or text, then metric.
        details: More for the file: settings, versions, single documents. Values that are not finite become null in it.

    Returns:
        The file; None where the checkpoint lies in no run folder, and nothing is written.

    Raises:
        ValueError: It cannot be written.
    """
    if trained.run_dir is None:
        return None
    about = {"step": trained.step, "tokens_seen": trained.tokens_seen, "checkpoint": trained.checkpoint.name}
    content = {"kind": kind, "name": name, "time": time.time(), **about, "results": results, **(details or {})}
    path = trained.run_dir / "eval" / f"{name}-step-{trained.step}.json"
    unfinished = path.with_suffix(".tmp")
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise ValueError(f"{path} could not be written: {error.strerror}") from error
    drawn = max(0, trained.step - 1)  # as training and validation: a resume from step N takes back what is at N
    with SummaryWriter(str(trained.run_dir / "tensorboard"), filename_suffix=".eval") as writer:
        for task, metrics in results.items():
            for metric, value in metrics.items():
                writer.add_scalar(f"eval/{task}/{metric}", value, drawn)
    return path


def check_writable(trained: Trained) -> None:
    """Find out before the work, and not after it, that its results cannot be written.

    Raises:
        ValueError: The run folder takes nothing.
    """
    if trained.run_dir is None:
        return
    folder = trained.run_dir / "eval"
    folder = folder if folder.exists() else trained.run_dir
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"results cannot be written to {folder}: {error.strerror}") from error


def _finite(value: Any) -> Any:
    """Replace what JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
