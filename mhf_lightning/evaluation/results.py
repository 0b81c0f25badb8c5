"""Results in the run folder, ``eval/NAME-step-N.json``, and in TensorBoard, ``eval/NAME/METRIC`` at N - 1."""

from __future__ import annotations

import json
import math
import time
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
        results: Values that are not finite become null in the file.
        details: More for the file: settings, versions, single documents.

    Returns:
        The file; None where the checkpoint lies in no run folder, and nothing is written.
    """
    if trained.run_dir is None:
        return None
    finite = {
        task: {metric: value if math.isfinite(value) else None for metric, value in metrics.items()}
        for task, metrics in results.items()
    }
    about = {"step": trained.step, "tokens_seen": trained.tokens_seen, "checkpoint": trained.checkpoint.name}
    content = {"kind": kind, "name": name, "time": time.time(), **about, "results": finite, **(details or {})}
    path = trained.run_dir / "eval" / f"{name}-step-{trained.step}.json"
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    drawn = max(0, trained.step - 1)  # as training and validation: a resume from step N takes back what is at N
    with SummaryWriter(str(trained.run_dir / "tensorboard"), filename_suffix=".eval") as writer:
        for task, metrics in results.items():
            for metric, value in metrics.items():
                writer.add_scalar(f"eval/{task}/{metric}", value, drawn)
    return path
