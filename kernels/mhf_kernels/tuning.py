"""Tile shapes of the Triton kernels: a shipped table per (architecture, d_h, dtype), with a safe default.

Nothing here measures; `python -m mhf_kernels.tune` does, and writes the table. A job never tunes by itself: ranks that
tune separately wait for each other, or run different kernels.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KERNELS = ("forward", "decode", "backward_tokens", "backward_weights")
TABLE = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut.

    Attributes:
        block_m: tokens of a tile.
        block_n: columns of d_ff of a tile.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        programs_per_sm: programs that run at a time on a multiprocessor; small problems are split until they fill all.
        transposed: backward_weights only: compute the scores as [block_n, block_m].
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2
    transposed: bool = False


def key(kernel: str, arch: str, d_h: int, dtype: str) -> str:
    """Return the name of a row of the table.

    Args:
        kernel: one of `KERNELS`.
        arch: compute capability, as `sm_90`.
        d_h: width of a head; rows are kept by the next power of two.
        dtype: `half` (float16 and bfloat16 run alike) or `float32`.
    """
    return f"{kernel}/{arch}/{d_h}/{dtype}"


def lookup(kernel: str, arch: str, block_d: int, dtype: str) -> tuple[Tile, str]:
    """Return the tile for a kernel, and where it comes from.

    Args:
        kernel: one of `KERNELS`.
        arch: compute capability, as `sm_90`.
        block_d: d_h, rounded up to a power of two.
        dtype: `half` or `float32`.

    Returns:
        The tile, and `tuned` or `default`.
    """
    row = table().get(key(kernel, arch, block_d, dtype))
    if row is not None:
        return row, "tuned"
    return default(kernel, block_d, dtype), "default"


def default(kernel: str, block_d: int, dtype: str) -> Tile:
    """Return a tile that fits into the registers and shared memory (99 KiB) of every GPU from Ampere on.

    One case has no such tile, TF32 with d_h above 128: see `triton_backend`.
    """
    if dtype == "float32":
        wide = block_d > 128
        narrow_m = kernel == "decode" or (wide and kernel.startswith("backward"))
        narrow_n = wide or (block_d == 128 and kernel == "backward_tokens")  # for TF32, which needs more than IEEE
        transposed = kernel == "backward_weights"
        return Tile(16 if narrow_m else 32, 16 if narrow_n else 32, num_warps=4, num_stages=1, transposed=transposed)
    if kernel == "decode":
        return Tile(16, 32 if block_d <= 128 else 16, num_warps=4, num_stages=3 if block_d <= 128 else 2)
    if kernel == "backward_weights":
        return Tile(16, 64 if block_d <= 128 else 32, num_warps=4, num_stages=2, transposed=True)
    wide = block_d > 128
    return Tile(64, 16 if wide else 32, num_warps=4, num_stages=2)


@functools.cache
def table() -> dict[str, Tile]:
    """Return the shipped table; `install` and `forget` change rows of it in this process."""
    return read(TABLE)


def read(path: Path) -> dict[str, Tile]:
    """Return the rows of a table file; none where there is no file."""
    rows: dict[str, dict[str, Any]] = _content(path)["tiles"]
    return {name: Tile(**row) for name, row in rows.items()}


def measured(path: Path) -> dict[str, str]:
    """Return the GPU and the versions that measured the rows of a table file, for each architecture."""
    return _content(path)["measured"]


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"measured": {}, "tiles": {}}


def install(rows: dict[str, Tile]) -> None:
    """Use these rows from now on in this process, instead of or beside those of the shipped table."""
    table().update(rows)


def forget(name: str) -> None:
    """Drop a row in this process: from now on, its default is used."""
    table().pop(name, None)


def dump(rows: dict[str, Tile], measured: dict[str, str]) -> str:
    """Return the text of a table file; `measured` names the GPU and the versions for each architecture."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(asdict(rows[name]))}" for name in sorted(rows))
    return f'{{\n  "measured": {json.dumps(measured)},\n  "tiles": {{\n{lines}\n  }}\n}}\n'
