"""The results of `mhf bench layer` as text, CSV and plot. May import matplotlib, and torch never."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LAYER_COLUMNS = (
    *("peer", "status", "in_block"),
    *("batch", "L", "tokens", "d_model", "d_h", "num_heads", "num_subnetworks", "d_e", "d_ff"),
    *("parameters", "backend", "forward_ms", "backward_ms", "forward_backward_ms"),
    *("forward_share", "backward_share", "forward_backward_share"),
    *("inference_peak_mib", "training_peak_mib", "kept_mib", "kept_and_output_mib"),
    *("gemm_tflops", "device", "dtype", "torch", "triton"),
)
DECODE_COLUMNS = (
    *("status", "tokens", "d_model", "d_h", "num_heads", "num_subnetworks", "d_e", "backend"),
    *("microseconds", "weights_mib", "weight_sets", "gb_per_s", "copy_share", "copy_gb_per_s"),
    *("device", "dtype", "torch", "triton"),
)
AXES = ("L", "d_model", "d_h")
ABOUT = ("device", "dtype", "torch")  # what a plot's title says
PANELS = {
    "forward_ms": "inference (ms)",
    "forward_backward_ms": "forward + backward (ms)",
    "inference_peak_mib": "inference peak (MiB)",
    "training_peak_mib": "forward + backward peak (MiB)",
    "kept_mib": "kept for backward (MiB)",
}
NOT_MEASURED = "n/a"
PLOT_NEEDS = "the plot needs matplotlib: pip install matplotlib"


class CsvFile:
    """A CSV file, written and flushed row by row: an interrupted run keeps what it measured.

    Args:
        path: Must not exist yet, unless `go_on`.
        columns: The header.
        go_on: Append to the rows of a file that exists.
    """

    def __init__(self, path: Path, columns: Sequence[str], go_on: bool = False) -> None:
        self._file = path.open("a" if go_on else "x", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval=NOT_MEASURED)
        if not self._file.tell():
            self._writer.writeheader()

    def write(self, row: Row) -> None:
        """Append a row; columns that it lacks become `n/a`."""
        self._writer.writerow(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        )
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def layer_tables(rows: Iterable[Row]) -> str:
    """One Markdown table for each point of the sweep."""
    headings = {
        "peer": "peer",
        "parameters": "parameters",
        "forward_ms": "forward ms",
        "forward_share": "of GEMM",
        "backward_ms": "backward ms",
        "backward_share": "of GEMM",
        "forward_backward_ms": "fwd+bwd ms",
        "inference_peak_mib": "inference peak MiB",
        "training_peak_mib": "fwd+bwd peak MiB",
        "kept_mib": "kept MiB",
        "kept_and_output_mib": "kept + output MiB",
    }
    parts = []
    for _, group in groupby(rows, key=lambda row: [row[name] for name in ("batch", *AXES)]):
        point = list(group)
        first = point[0]
        widths = {"FlashMHF" if row["num_subnetworks"] else "SwiGLU": row["d_ff"] for row in point}
        d_ff = ", ".join(f"{width} ({layer})" for layer, width in widths.items())
        around = ", with norm and residual" if first["in_block"] else ""
        parts.append(
            f"batch {first['batch']}, L {first['L']}, d_model {first['d_model']}, d_h {first['d_h']}, "
            f"d_ff {d_ff}{around}; GEMM {first['gemm_tflops']:.4g} TFLOP/s\n\n"
            + markdown(headings, [_with_status(row) for row in point])
        )
    return "\n\n".join(parts)


def decode_table(rows: Iterable[Row]) -> str:
    """The decode rows as a Markdown table."""
    headings = {
        "tokens": "B*L",
        "d_model": "d_model",
        "d_h": "d_h",
        "backend": "backend",
        "microseconds": "us",
        "weights_mib": "K, U, V MiB",
        "gb_per_s": "GB/s",
        "copy_share": "of copy",
        "copy_gb_per_s": "copy GB/s",
        "status": "status",
    }
    return markdown(headings, list(rows))


def _with_status(row: Row) -> Row:
    return row if row["status"] == "ok" else {**row, "peer": f"{row['peer']} ({row['status']})"}


def markdown(headings: dict[str, str], rows: list[Row]) -> str:
    """A Markdown table: a column for each heading, `n/a` where a row lacks its value."""
    lines = [list(headings.values())] + [[_cell(name, row.get(name)) for name in headings] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    texts = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {text} |" for text in (texts[0], rule, *texts[1:]))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if name.endswith("_share"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if name == "parameters" else str(value)


def read_rows(path: Path, needed: set[str], what: str) -> list[dict[str, str]]:
    """Return the rows of a benchmark's CSV file, which may be older than this code and lack what is not needed.

    Raises:
        ValueError: It is not what it should be: a column that is needed is missing.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = needed - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is no {what}: it lacks {', '.join(sorted(missing))}")
        return list(reader)


def plot(csv_path: Path, png_path: Path) -> None:
    """Draw a layer CSV: a row of panels for each axis that varies, or bars where there is one point only.

    Raises:
        ValueError: the file holds no measured row, or is no result of `mhf bench layer`.
        FileExistsError: the image exists.
        ImportError: matplotlib is not installed.
    """
    needed = {"peer", "batch", *ABOUT, *AXES, *PANELS}
    rows = [_parsed(row) for row in read_rows(csv_path, needed, "layer.csv of mhf bench layer")]
    panels = {name: title for name, title in PANELS.items() if any(name in row for row in rows)}
    if not panels:
        raise ValueError(f"{csv_path} holds no measured row")

    from matplotlib.figure import Figure

    sweeps = [sweep for axis in AXES if (sweep := _sweep(rows, axis))]
    figure = Figure(figsize=(4 * len(panels), 3.6 * max(len(sweeps), 1) + 1), layout="constrained")
    grid = figure.subplots(max(len(sweeps), 1), len(panels), squeeze=False)
    peers = list(dict.fromkeys(row["peer"] for row in rows if "forward_ms" in row))
    for line, (axis, points) in zip(grid, sweeps, strict=False):
        for panel, name in zip(line, panels, strict=True):
            _curves(panel, points, axis, name, peers)
            panel.set_title(panels[name])
    if sweeps:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(panels))
    else:
        for panel, name in zip(grid[0], panels, strict=True):
            measured = [row for row in reversed(rows) if name in row]
            panel.barh([row["peer"] for row in measured], [row[name] for row in measured])
            panel.set_title(panels[name])
    first = rows[0]
    figure.suptitle(f"{first['device']}, {first['dtype']}, torch {first['torch']}, batch {first['batch']}")
    with png_path.open("xb") as image:
        figure.savefig(image, format="png", dpi=120)


def _parsed(row: dict[str, str]) -> Row:
    """Turn the columns that a plot needs into numbers; what was not measured is left out."""
    parsed: Row = {name: row[name] for name in ("peer", "batch", *ABOUT)}
    parsed |= {axis: int(row[axis]) for axis in AXES}
    return parsed | {name: float(row[name]) for name in PANELS if row[name] != NOT_MEASURED}


def _sweep(rows: list[Row], axis: str) -> tuple[str, list[Row]] | None:
    """Return the rows in which only `axis` varies, where there are such: the longest such series."""
    others = [name for name in AXES if name != axis]
    series: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        series.setdefault(tuple(row[name] for name in others), []).append(row)
    longest = max(series.values(), key=lambda points: len({row[axis] for row in points}))
    return (axis, longest) if len({row[axis] for row in longest}) > 1 else None


def _curves(panel: Any, points: list[Row], axis: str, name: str, peers: list[str]) -> None:
    for number, peer in enumerate(peers):
        curve = sorted((row[axis], row[name]) for row in points if row["peer"] == peer and name in row)
        panel.plot(
            [x for x, _ in curve],
            [y for _, y in curve],
            label=peer,
            color=f"C{number % 10}",
            marker="o",
            linestyle="--" if "swiglu" in peer or "tiled" in peer else "-",
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = sorted({row[axis] for row in points})
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    fixed = ", ".join(f"{other} {points[0][other]}" for other in AXES if other != axis)
    panel.set_xlabel(f"{axis} ({fixed})")
    panel.grid(alpha=0.3)
