"""`python -m mhf_kernels.tune`: measure the tile shapes of the Triton kernels on this GPU and write the tuning table.

May import torch, triton and its siblings. A candidate counts only if its results equal those of the default tile.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton.errors import TritonError

from mhf_kernels import triton_backend, tuning
from mhf_kernels.triton_backend import TileWarning
from mhf_kernels.tuning import Tile

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Job = tuple[str, int, str, Tile]

D_H = (32, 64, 128, 256)
DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
WIDTH = 2048  # heads * d_h of the measured layer
D_FF = 4096
TOKENS = {"half": 16384, "float32": 2048}
DECODED_TOKENS = 16
# Relative difference between two tiles: a few roundings of the output's dtype, and sums in another order.
TOLERANCE = {"half": 2e-2, "float32": 1e-4}

# block_m, block_n, num_warps, num_stages
_TOKEN_TILES = [
    (128, 128, 8, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 32, 8, 2),
    (128, 32, 8, 3),
    (64, 128, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 8, 2),
    (64, 32, 4, 2),
    (64, 32, 4, 3),
]
_WEIGHT_TILES = [  # ..., transposed
    (16, 64, 4, 3, True),
    (16, 64, 4, 4, True),
    (32, 64, 4, 3, True),
    (64, 64, 4, 2, True),
    (64, 64, 4, 3, True),
    (16, 64, 8, 3, True),
    (32, 64, 8, 2, True),
    (64, 64, 8, 2, True),
    (32, 128, 8, 3, True),
    (64, 128, 8, 2, True),
    (64, 64, 4, 2, False),
    (128, 64, 8, 2, False),
    (128, 64, 8, 3, False),
    (64, 32, 8, 2, False),
]
_DECODE_TILES = [(16, 128, 4, 2), (16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 8, 3), (16, 32, 4, 3), (16, 32, 4, 4)]
_FLOAT32_TILES = [(32, 32, 4, 1), (32, 32, 4, 2), (64, 32, 4, 1), (64, 32, 8, 1), (32, 64, 4, 1), (64, 64, 8, 1)]


def candidates(kernel: str, dtype: str) -> list[Tile]:
    """Return the tiles to try for one of `tuning.KERNELS`."""
    if kernel == "decode":
        tiles = [Tile(*t, programs_per_sm=n) for t, n in itertools.product(_DECODE_TILES, (1, 2))]
        return tiles if dtype == "half" else [replace(t, num_stages=1) for t in tiles[2:4]]
    if dtype == "float32":
        transposed = (True, False) if kernel == "backward_weights" else (False,)
        return [Tile(*t, programs_per_sm=2, transposed=x) for t, x in itertools.product(_FLOAT32_TILES, transposed)]
    if kernel == "backward_weights":
        return [Tile(m, n, w, s, 8 // w, transposed) for m, n, w, s, transposed in _WEIGHT_TILES]
    return [Tile(m, n, w, s, 8 // w) for m, n, w, s in _TOKEN_TILES]


def tune(d_hs: Iterable[int], dtypes: Iterable[str], log: Callable[[str], None], workers: int = 8) -> dict[str, Tile]:
    """Measure every candidate on the current CUDA device.

    Args:
        d_hs: widths of a head; each is tuned for the next power of two.
        dtypes: of `DTYPES`.
        log: receives a line for every candidate and every choice.
        workers: processes that compile.

    Returns:
        The rows of the table: the fastest tile for each kernel, d_h and dtype.
    """
    blocks = sorted({triton.next_power_of_2(d_h) for d_h in d_hs})
    jobs = [
        (kernel, block_d, dtype, tile)
        for dtype in dtypes
        for block_d in blocks
        for kernel in tuning.KERNELS
        for tile in candidates(kernel, dtype)
    ]
    log(f"compiling {len(jobs)} candidates in {workers} processes")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        failures = list(pool.map(_compile, jobs))  # into Triton's cache on disk, which this process reads
    if None not in failures:
        raise RuntimeError(f"no candidate runs; the first failure: {failures[0]}")

    arch = triton_backend.arch(torch.device("cuda"))
    rows = {}
    for (kernel, block_d, dtype), group in itertools.groupby(zip(jobs, failures, strict=True), lambda x: x[0][:3]):
        name = tuning.key(kernel, arch, block_d, dtype)
        tiles = []
        for (_, _, _, tile), failure in group:
            if failure is None:
                tiles.append(tile)
            else:
                log(f"  {name} {tile}: cannot run, left out: {failure.splitlines()[0]}")
        rows[name] = _fastest(kernel, block_d, dtype, name, tiles, log)
        tuning.install({name: rows[name]})
        log(f"{name}: {rows[name]}")
    return rows


def _fastest(kernel: str, block_d: int, dtype: str, name: str, tiles: list[Tile], log: Callable[[str], None]) -> Tile:
    """Return the fastest of the tiles whose results equal those of the default tile; that one where there is none."""
    default = tuning.default(kernel, block_d, dtype)
    inputs, grad = _inputs(kernel, block_d, dtype)
    expected = _run(kernel, default, name, inputs[0], grad)
    times = {}
    for tile in tiles:
        difference = _difference(_run(kernel, tile, name, inputs[0], grad), expected)
        if not difference <= TOLERANCE[dtype]:
            log(f"  {name} {tile}: results differ by {difference:.1e}, left out")
            continue
        times[tile] = _milliseconds(kernel, inputs, grad)
        log(f"  {name} {times[tile]:8.3f} ms {tile}")
    if not times:
        log(f"  {name}: every candidate is left out, so the default tile stays")
        return default
    return min(times, key=lambda tile: times[tile])


def tune_on_one_rank(d_h: int, dtype: torch.dtype, log: Callable[[str], None]) -> None:
    """Tune for one layer inside a job: rank 0 measures, and every rank uses what it found.

    A collective: every rank calls it, with the same arguments. Without a process group, this process tunes.

    Args:
        d_h: width of a head.
        dtype: of the op's inputs.
        log: receives progress, on rank 0.

    Raises:
        RuntimeError: rank 0 could not tune; on every rank.
    """
    outcome: list[dict[str, Tile] | str] = [{}]  # the rows, or why there are none
    cause = None
    distributed = dist.is_available() and dist.is_initialized()
    if not distributed or dist.get_rank() == 0:
        try:
            outcome = [tune([d_h], ["float32" if dtype == torch.float32 else "half"], log)]
        except Exception as error:  # the other ranks wait for an answer
            outcome, cause = [f"{type(error).__name__}: {error}"], error
    if distributed:
        dist.broadcast_object_list(outcome, src=0)
    rows = outcome[0]
    if isinstance(rows, str):
        raise RuntimeError(
            f"rank 0 could not tune the kernels ({rows}); without tuning, the shipped tiles run"
        ) from cause
    tuning.install(rows)


def _inputs(kernel: str, d_h: int, dtype: str) -> tuple[list[Inputs], Tensor]:
    """Return sets of inputs, several where one would stay in the L2 cache, and a gradient of the output."""
    tokens = DECODED_TOKENS if kernel == "decode" else TOKENS[dtype]
    heads, d_e = WIDTH // d_h, 256
    subnetworks = D_FF // d_e

    def draw() -> Inputs:
        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(shape, device="cuda", dtype=DTYPES[dtype])

        weights = (heads, subnetworks, d_e, d_h)
        # As router_weights lays it out.
        r = torch.rand(heads, subnetworks, 1, tokens, device="cuda").permute(2, 3, 0, 1)
        return (
            normal(1, tokens, heads, d_h),
            normal(*weights, std=d_h**-0.5),
            normal(*weights, std=d_h**-0.5),
            normal(*weights, std=d_e**-0.5),
            r / r.sum(-1, keepdim=True),
        )

    sets = [draw() for _ in range(4 if kernel == "decode" else 1)]
    return sets, torch.randn_like(sets[0][0])


def _call(kernel: str, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    if kernel in ("forward", "decode"):
        return [triton_backend.forward(*inputs)]
    tokens = kernel == "backward_tokens"
    grads = triton_backend.backward(grad, *inputs, (tokens, not tokens, not tokens, not tokens, tokens))
    return [x for x in grads if x is not None]


def _run(kernel: str, tile: Tile, name: str, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    tuning.install({name: tile})
    return _call(kernel, inputs, grad)


def _compile(job: Job) -> str | None:
    """Launch a candidate once on few tokens, and return why it cannot run, if so."""
    kernel, block_d, dtype, tile = job
    try:
        inputs, grad = _inputs(kernel, block_d, dtype)
        few = inputs[0] if kernel == "decode" else (inputs[0][0][:, :2048], *inputs[0][1:4], inputs[0][4][:, :2048])
        name = tuning.key(kernel, triton_backend.arch(torch.device("cuda")), block_d, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TileWarning)  # the default would run in the candidate's place
            _run(kernel, tile, name, few, grad[:, : few[0].shape[1]])
        torch.cuda.synchronize()
    except (TritonError, TileWarning, RuntimeError) as error:  # TritonError: among others, what ptxas rejects
        return f"{type(error).__name__}: {error}"
    return None


def _difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours, expected, strict=True))


def _milliseconds(kernel: str, inputs: list[Inputs], grad: Tensor) -> float:
    def call() -> None:
        for one in inputs:
            _call(kernel, one, grad)

    if kernel == "decode":
        return triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median") / len(inputs)
    return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")


def main() -> None:
    """Tune, print the choices, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m mhf_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--d_h", type=int, nargs="+", default=list(D_H), help="widths of a head")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="half: bf16 and fp16")
    parser.add_argument("--output", type=Path, default=tuning.TABLE, help="table to write; rows of other GPUs stay")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("mhf_kernels.tune: there is no CUDA device here; tune on the GPU that is to run the kernels")
    rows = tuning.read(options.output)
    rows.update(tune(options.d_h, options.dtype, lambda line: print(line, flush=True), options.workers))
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    measured = tuning.measured(options.output)
    measured[triton_backend.arch(torch.device("cuda"))] = f"{torch.cuda.get_device_name()}, {versions}"
    options.output.write_text(tuning.dump(rows, measured))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
