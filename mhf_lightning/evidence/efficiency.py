"""The paper's efficiency table again: rows of `mhf bench layer` and `mhf bench model` beside what the paper printed."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from mhf_lightning.bench.report import Row, markdown

ABOUT = """\
Batch {batch}. Memory: highest allocation of one layer's inference above its inputs and weights, MiB, and how many times
less FlashMHF, compiled, takes than SwiGLU. Latency: a prefill of the whole model, ms, and how many times faster
FlashMHF, compiled, is than SwiGLU, compiled; where they were measured, also both as CUDA graphs. The paper's columns
are as printed (MB, ms), for batch 8 on an H100.
Measured on {device}, {dtype}, torch {torch}, triton {triton}."""


def write(layer_csv: Path, model_csv: Path, paper_csv: Path, out: Path) -> None:
    """Write both tables as Markdown.

    Args:
        layer_csv: Of `mhf bench layer`, with the peers `swiglu`, `swiglu_compiled` and `flash_mhf_compiled` at least.
        model_csv: Of `mhf bench model --only inference`: a SwiGLU and one FlashMHF model, compiled at least.
        paper_csv: What the paper printed, by L.
        out: The file to write.

    Raises:
        ValueError: A file lacks a column or what is compared, the two are not of one batch and device, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name another file with --out")
    layers, models = _read(layer_csv, "peer", "inference_peak_mib"), _read(model_csv, "mode", "inference_ms")
    paper = {int(row["L"]): row for row in _read(paper_csv, "L", "swiglu_layer_peak_mb")}
    for key in ("batch", "device", "dtype"):
        found = {row[key] for row in layers + models}
        if len(found) != 1:
            raise ValueError(f"the rows of {layer_csv} and {model_csv} do not compare: {key} is {', '.join(found)}")
    text = [
        "# Efficiency, ours beside the paper's",
        ABOUT.format(**layers[0]),
        "## Peak memory of a layer",
        _memory(layers, paper, layer_csv),
        "## Latency of a model",
        _latency(models, paper, model_csv),
    ]
    with out.open("x", encoding="utf-8") as file:
        file.write("\n\n".join(text) + "\n")


def _memory(layers: list[Row], paper: dict[int, Row], source: Path) -> str:
    peers = list(dict.fromkeys(row["peer"] for row in layers))
    missing = {"swiglu", "swiglu_compiled", "flash_mhf_compiled"} - set(peers)
    if missing:
        raise ValueError(f"{source} lacks the peers {', '.join(sorted(missing))}; measure them in one run")
    headings = {"L": "L"} | {peer: peer for peer in peers}
    headings |= {"eager": "less than eager", "compiled": "less than compiled"}
    headings |= {"paper_swiglu": "paper: SwiGLU", "paper_mhf": "paper: FlashMHF", "paper": "paper: less"}
    table = []
    for length, rows in _by_length(layers):
        peaks = {row["peer"]: _number(row["inference_peak_mib"]) for row in rows}
        row: Row = {"L": length} | {peer: peak for peer, peak in peaks.items() if peak is not None}
        row["eager"] = _ratio(peaks["swiglu"], peaks["flash_mhf_compiled"])
        row["compiled"] = _ratio(peaks["swiglu_compiled"], peaks["flash_mhf_compiled"])
        row |= _printed(paper, length, "swiglu_layer_peak_mb", "flash_mhf_layer_peak_mb")
        table.append(row)
    return markdown(headings, table)


def _latency(models: list[Row], paper: dict[int, Row], source: Path) -> str:
    names = list(dict.fromkeys(row["model"] for row in models))
    baseline = next((name for name in names if "swiglu" in name), None)
    mhf = next((name for name in names if "flash_mhf" in name), None)
    if baseline is None or mhf is None:
        raise ValueError(f"{source} lacks a SwiGLU or a FlashMHF model; measure both in one run")
    columns = list(dict.fromkeys(f"{row['model']}, {row['mode']}" for row in models))
    headings = {"L": "L"} | {column: column for column in columns} | {"speedup": "faster", "graph": "faster, graph"}
    headings |= {"paper_swiglu": "paper: SwiGLU", "paper_mhf": "paper: FlashMHF", "paper": "paper: faster"}
    table = []
    for length, rows in _by_length(models):
        times = {f"{row['model']}, {row['mode']}": _number(row["inference_ms"]) for row in rows}
        row: Row = {"L": length} | {column: time for column, time in times.items() if time is not None}
        row["speedup"] = _ratio(times.get(f"{baseline}, compiled"), times.get(f"{mhf}, compiled"))
        row["graph"] = _ratio(times.get(f"{baseline}, compiled_graph"), times.get(f"{mhf}, compiled_graph"))
        row |= _printed(paper, length, "swiglu_24_layers_ms", "flash_mhf_20_layers_ms")
        table.append(row)
    return markdown(headings, table)


def _printed(paper: dict[int, Row], length: int, swiglu: str, mhf: str) -> Row:
    values = [_number(paper.get(length, {}).get(column, "")) for column in (swiglu, mhf)]
    return {"paper_swiglu": values[0], "paper_mhf": values[1], "paper": _ratio(*values)}


def _ratio(baseline: float | None, ours: float | None) -> str | None:
    return None if baseline is None or ours is None else f"{baseline / ours:.2f}x"


def _by_length(rows: list[Row]) -> Iterable[tuple[int, list[Row]]]:
    for length in sorted({int(row["L"]) for row in rows}):
        yield length, [row for row in rows if int(row["L"]) == length]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # not measured, or not printed


def _read(path: Path, *columns: str) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = list(csv.DictReader(file))
    if not rows or any(column not in rows[0] for column in columns):
        raise ValueError(f"{path} holds no rows with the columns {', '.join(columns)}")
    return rows
