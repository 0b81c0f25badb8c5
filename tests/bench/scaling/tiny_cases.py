"""Cases of a tiny model, and their results."""

import csv
from pathlib import Path

import yaml

from mhf_lightning.bench.scaling import cases
from mhf_lightning.bench.scaling.cases import Sizes
from mhf_lightning.bench.scaling.processes import Outcome, run_cases, start_server

FFN = {"name": "flash_mhf", "num_heads": 2, "num_subnetworks": 2, "d_e": 16}
DECODER = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_attention_heads": 2, "ffn": FFN}
LENGTH, MICRO_BATCH, STEPS = 16, 2, 4


def write_model(folder: Path, **changes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"model": {"decoder": {**DECODER, **changes}}}))
    return str(folder / "tiny.yaml")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sizes(model: str, *strategies: str, processes=(1, 2)) -> Sizes:
    return Sizes((model,), strategies, processes, MICRO_BATCH, 8, LENGTH, STEPS, "32-true", compiled=False)


def run(tmp_path: Path, *several: cases.Case, slots=("", ""), timeout: float = 120.0, share=1) -> dict[str, Outcome]:
    """Run cases; on a CPU, slots with names are made-up GPUs."""
    ended: dict[str, Outcome] = {}
    slots = list(slots)
    threads = start_server(slots, tmp_path / "inductor")

    def on_end(case: cases.Case, end: Outcome) -> None:
        ended[case.label] = end

    run_cases(several, slots, threads, tmp_path, timeout, on_end, lambda case: None, share)
    return {case.label: ended[case.label] for case in several}


def outcome_of(curve: dict[int, tuple[float, float]]) -> Outcome:
    events = [
        {"step": step, "at": float(step), "loss": loss, "grad_norm": norm} for step, (loss, norm) in curve.items()
    ]
    done = {"num_layers": 2, "parameters": 10, "durations_s": [0.5, 0.3, 0.8, 0.4]}
    done = {"done": done | {"peak_flops": 1e3, "peak_bytes": 2**30}}
    return Outcome("ok", [[*events, done]], 1.0, 1.0)
