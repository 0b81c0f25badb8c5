"""From what the ranks of a case wrote to the rows of the CSV files. No torch."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from mhf_lightning.bench.report import Row
from mhf_lightning.bench.scaling.cases import Case, model_name
from mhf_lightning.bench.scaling.processes import Outcome

GIB = 2**30

_CASE = ("model", "strategy", "gpus", "status")
ABOUT = ("device", "date", "commit", "torch", "triton", "lightning", "deepspeed")
SCALING_COLUMNS = (
    *("stage", *_CASE, "micro_batch", "accumulate", "global_batch", "L", "precision", "compiled"),
    *("num_layers", "parameters", "steps", "step_ms", "slowest_step_ms", "tokens_per_s", "tokens_per_s_per_gpu"),
    *("efficiency", "flops_per_token", "mfu", "peak_gib", "lowest_peak_gib", "reserved_gib", "start_s", "case_s"),
    *("beside", "file", *ABOUT),
)
PARITY_COLUMNS = (
    *_CASE,
    *("continues", "global_batch", "L", "precision", "compiled", "num_layers", "parameters", "steps"),
    *("loss_difference", "median_loss_difference", "grad_norm_difference", "median_grad_norm_difference"),
    *("loss_tolerance", "grad_norm_tolerance", "first_loss", "last_loss", "case_s"),
    *("beside", *ABOUT),
)
CURVE_COLUMNS = ("model", "strategy", "gpus", "continues", "step", "loss", "grad_norm")
CHECKPOINT_COLUMNS = (
    *_CASE,
    *("parameters", "checkpoint_gib", "stall_s", "gib_per_s", "background_stall_s"),
    *("later_background_stall_s", "background_s", "step_ms"),
    *("background_step_ms", "saved_step", "killed_step", "noticed_s", "started_s", "loaded_s", "recovery_s"),
    *("loss_difference", *ABOUT),
)
# Largest relative differences at any step: loss, gradient norm. In bfloat16, strategies round at different places.
TOLERANCES = {"32-true": (1e-4, 1e-3), "bf16-mixed": (5e-3, 5e-2)}

Curve = dict[int, tuple[float, float]]


def identity(case: Case) -> Row:
    """Return the columns that say which case it is."""
    return {
        **{"stage": case.stage, "model": model_name(case.model), "strategy": case.strategy, "gpus": case.gpus},
        **{"micro_batch": case.micro_batch, "accumulate": case.accumulate, "global_batch": case.global_batch},
        **{"L": case.length, "precision": case.precision, "compiled": case.compiled, "file": case.model},
    }


def _ended(case: Case, outcome: Outcome) -> Row:
    """Return the columns of any case that has ended; `beside` without the stage, which is the same."""
    beside = "; ".join(label.partition(", ")[2] for label in outcome.beside) or "none"
    return identity(case) | {"status": outcome.status, "case_s": outcome.seconds, "beside": beside}


def scaling_row(case: Case, outcome: Outcome, flops_per_token: float, baseline: Row | None) -> Row:
    """Return the row of a measured training, with what could be measured.

    Args:
        case: The case.
        outcome: What came of it.
        flops_per_token: Of the model, forward and backward.
        baseline: The row of one process of the same stage and model.
    """
    row = _ended(case, outcome) | {"flops_per_token": flops_per_token}
    if outcome.status != "ok":
        return row
    done = outcome.done()
    durations = max((rank["durations_s"] for rank in done), key=sum)
    rate = len(durations) * case.global_batch * case.length / sum(durations)
    row |= {name: done[0][name] for name in ("num_layers", "parameters")}
    row |= {"steps": len(durations), "tokens_per_s": rate, "tokens_per_s_per_gpu": rate / case.gpus}
    row |= {"step_ms": 1e3 * statistics.mean(durations), "slowest_step_ms": 1e3 * max(durations)}
    row["start_s"] = max(_time(events, "step") - _time(events, "started") for events in outcome.events)
    if (case.strategy, case.gpus) == ("single", 1):
        row["efficiency"] = 1.0
    elif baseline is not None and "tokens_per_s_per_gpu" in baseline:
        row["efficiency"] = row["tokens_per_s_per_gpu"] / baseline["tokens_per_s_per_gpu"]
    if done[0].get("peak_flops"):
        row["mfu"] = row["tokens_per_s_per_gpu"] * flops_per_token / done[0]["peak_flops"]
    if "peak_bytes" in done[0]:
        peaks = [rank["peak_bytes"] / GIB for rank in done]
        row |= {"peak_gib": max(peaks), "lowest_peak_gib": min(peaks)}
        row["reserved_gib"] = max(rank["reserved_bytes"] for rank in done) / GIB
    return row


def _time(events: list[dict[str, Any]], what: str) -> float:
    """Return the time of the first line of a kind."""
    return next(event["at" if what == "step" else "time"] for event in events if what in event)


def curve(outcome: Outcome) -> Curve:
    """Return loss and gradient norm by step; all ranks know the same."""
    return {event["step"]: (event["loss"], event["grad_norm"]) for event in outcome.events[0] if "step" in event}


def differences(reference: Curve, other: Curve) -> dict[str, float]:
    """Return the largest and the median relative difference over the steps of `other`.

    Raises:
        ValueError: A step is not in the reference, or there are none.
    """
    if not other or not other.keys() <= reference.keys():
        raise ValueError(f"steps {sorted(other)[:3]}... are not those of the reference, {sorted(reference)[:3]}...")
    result = {}
    for place, name in enumerate(("loss", "grad_norm")):
        relative = [abs(values[place] / reference[step][place] - 1) for step, values in other.items()]
        # The largest of numbers among which there is a NaN is any of them.
        result[f"{name}_difference"] = math.nan if any(map(math.isnan, relative)) else max(relative)
        result[f"median_{name}_difference"] = statistics.median(relative)
    return result


def parity_row(case: Case, outcome: Outcome, reference: Curve | None) -> Row:
    """Return the row of a training that is compared with one process, step by step.

    Args:
        case: The case.
        outcome: What came of it.
        reference: What one process computed; None where that failed.
    """
    loss_tolerance, norm_tolerance = TOLERANCES[case.precision]
    row = _ended(case, outcome)
    row |= {"loss_tolerance": loss_tolerance, "grad_norm_tolerance": norm_tolerance}
    if case.continues is not None:
        row["continues"] = case.continues
    if outcome.status != "ok":
        return row
    steps = curve(outcome)
    row |= {name: outcome.done()[0][name] for name in ("num_layers", "parameters")}
    row |= {"steps": len(steps), "first_loss": steps[min(steps)][0], "last_loss": steps[max(steps)][0]}
    if reference is None:
        return row | {"status": "not compared: one process failed"}
    row |= differences(reference, steps)
    # A comparison with NaN is false: so NaN differs.
    alike = row["loss_difference"] <= loss_tolerance and row["grad_norm_difference"] <= norm_tolerance
    return row | {"status": "ok" if alike else "differs"}


def deaths(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the last lines of ranks that were to be killed."""
    return [event for events in outcome.events for event in events if "killed" in event]


def checkpoint_row(killed: tuple[Case, Outcome], resumed: Outcome, checkpoints: Path) -> Row:
    """Return the row of a training that saved, was killed, and went on.

    Args:
        killed: The case that saved, and what came of it.
        resumed: What came of the one that continued it.
        checkpoints: The folder of those that the case has saved.
    """
    case, outcome = killed
    row = identity(case) | {"status": outcome.status}
    if not deaths(outcome):
        return row
    death = deaths(outcome)[0]
    saves: dict[int, list[dict[str, Any]]] = {}  # what the ranks say of each, in the order of their steps
    for event in (event for events in outcome.events for event in events if "saved" in event):
        saves.setdefault(event["saved"], []).append(event)
    at_once, *in_background = [max(saves[step], key=lambda event: event["stall_s"]) for step in sorted(saves)]
    first = in_background[0]
    newest = checkpoints / f"step-{max(saves)}"
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / GIB
    committed = max(e["time"] for events in outcome.events for e in events if e.get("committed") == first["saved"])
    at = {event["step"]: event["at"] for event in outcome.events[0] if "step" in event}
    durations = {step: at[step] - at[step - 1] for step in at if step - 1 in at}
    # The first one after the warm-up, at whose end ranks wait for the device, ends when it is launched.
    quiet = [s for step, s in durations.items() if case.warmup + 1 < step < min(saves)]
    writing = [s for step, s in durations.items() if step > first["saved"] + 1 and at[step] <= committed]
    row |= {
        **{"checkpoint_gib": size, "stall_s": at_once["stall_s"], "gib_per_s": size / at_once["stall_s"]},
        "background_stall_s": first["stall_s"],
        "later_background_stall_s": max(event["stall_s"] for event in in_background[1:]),
        "background_s": committed - first["time"] + first["stall_s"],
        **{"step_ms": 1e3 * statistics.median(quiet), "saved_step": max(saves)},
        "killed_step": death["killed"],
        "noticed_s": outcome.ended - death["time"],
    }
    if writing:
        row["background_step_ms"] = 1e3 * statistics.median(writing)
    if resumed.status != "ok":
        return row | {"status": f"not continued, {resumed.status}"}
    killed_at = death["time"]
    row["started_s"] = max(_time(events, "started") for events in resumed.events) - killed_at
    row["loaded_s"] = max(_time(events, "training") for events in resumed.events) - killed_at
    row["recovery_s"] = max(_time(events, "step") for events in resumed.events) - killed_at
    row["parameters"] = resumed.done()[0]["parameters"]
    before, after = curve(outcome), curve(resumed)
    again = {step: values for step, values in after.items() if step in before}
    if min(after) != max(saves) + 1 or not again:
        return row | {"status": f"continued at step {min(after)}, not after {max(saves)}"}
    row["loss_difference"] = differences(before, again)["loss_difference"]
    alike = row["loss_difference"] <= TOLERANCES[case.precision][0]
    return row | {"status": "ok" if alike else "differs"}
