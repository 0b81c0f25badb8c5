"""`mhf bench layer`: FlashMHF, SwiGLU and the rest side by side in one run. Never imports Lightning or the model."""

from __future__ import annotations

import argparse
import datetime
import difflib
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mhf_kernels import dispatch
from torch import Tensor

from mhf_lightning.bench import measure, report
from mhf_lightning.bench.measure import OutOfMemoryError, Stopwatch
from mhf_lightning.bench.peers import D_E, PEERS, Peer, Sizes
from mhf_lightning.bench.report import Row

BATCH, LENGTH, D_MODEL, D_H = 8, 4096, 2048, 128  # shape S: 32,768 tokens through the layer of the released 1.3B model
SWEEP_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (1024, 4096, 16384)
SWEEP_D_MODEL = (512, 1024, 4096)
SWEEP_D_H = (64, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SECONDS, QUICK_SECONDS = 0.5, 0.1
DECODE_TOKENS = (1, 16)
DECODE_CALLS = 32  # in one CUDA graph, so that launches from the host and the graph's own start do not count

DESCRIPTION = """\
Measure a feed-forward layer of every kind in one run: time, peak memory, memory kept for the backward.
Without --shape, --length, --d_model and --d_h: three sweeps around shape S, over L, d_model and d_h.
With one of the last three or more: every combination of what they list, shape S's value for the rest."""


def build_parser() -> argparse.ArgumentParser:
    """The options of `mhf bench layer`."""
    parser = argparse.ArgumentParser(
        prog="mhf bench layer",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--shape",
        choices=["S"],
        help=f"one point: batch {BATCH}, L {LENGTH}, d_model {D_MODEL}, d_h {D_H}, d_ff 22 x {D_E} (the 1.3B layer)",
    )
    parser.add_argument("--length", type=int, nargs="+", metavar="L", help="tokens of a sequence")
    parser.add_argument("--d_model", type=int, nargs="+", metavar="N", help="widths of the layer")
    parser.add_argument("--d_h", type=int, nargs="+", metavar="N", help="widths of a FlashMHF head")
    parser.add_argument(
        "--d_e", type=int, default=D_E, metavar="N", help=f"width of a FlashMHF sub-network (default {D_E})"
    )
    parser.add_argument(
        "--in_block",
        action="store_true",
        help="measure x + layer(RMSNorm(x)), as in a Transformer; without the bare op",
    )
    parser.add_argument("--batch", type=int, metavar="B", help=f"sequences (default {BATCH})")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", default=list(PEERS), help=f"default: all ({', '.join(PEERS)})"
    )
    parser.add_argument("--quick", action="store_true", help="shorter measurements; without sizes, three L only")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the results (default runs/bench-layer-DATE-TIME)"
    )
    parser.add_argument(
        "--plot_from", type=Path, metavar="CSV", help="measure nothing; draw this layer.csv into layer.png beside it"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a peer failed for another reason than memory, or 2 for wrong use."""
    args = build_parser().parse_args(argv)
    try:
        if args.plot_from is not None:
            return _draw(args.plot_from, (args.output or args.plot_from.parent) / "layer.png")
        output = args.output or Path(f"runs/bench-layer-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        peers = [peer for peer in _peers(args.peers) if peer.family != "op" or not args.in_block]
        if not peers:
            raise ValueError("--in_block leaves out flash_mhf_op; name another peer")
        seconds = QUICK_SECONDS if args.quick else SECONDS
        return run(_points(args), peers, args.dtype, seconds, output, in_block=args.in_block)
    except (ValueError, OSError, ImportError) as error:
        return measure.refuse(error)
    except KeyboardInterrupt:
        measure.say("interrupted; the CSV files hold what was measured")
        return 130


def _points(args: argparse.Namespace) -> list[Sizes]:
    given = args.length or args.d_model or args.d_h
    if args.shape and (given or args.batch):
        raise ValueError("--shape S sets batch, L, d_model and d_h: give none of them, or leave it out")
    batch = BATCH if args.batch is None else args.batch
    if args.shape or given:
        grid = itertools.product(args.d_model or [D_MODEL], args.d_h or [D_H], args.length or [LENGTH])
        return [Sizes(batch, length, d_model, d_h, args.d_e) for d_model, d_h, length in grid]
    points = [
        Sizes(batch, length, D_MODEL, D_H, args.d_e) for length in (QUICK_LENGTHS if args.quick else SWEEP_LENGTHS)
    ]
    if not args.quick:
        points += [Sizes(batch, LENGTH, d_model, D_H, args.d_e) for d_model in SWEEP_D_MODEL]
        points += [Sizes(batch, LENGTH, D_MODEL, d_h, args.d_e) for d_h in SWEEP_D_H]
    return points


def _peers(names: list[str]) -> list[Peer]:
    for name in names:
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown peer {name}; allowed: {', '.join(PEERS)}{hint}")
    return [PEERS[name] for name in names]


def run(
    points: list[Sizes], peers: list[Peer], dtype_name: str | None, seconds: float, output: Path, *, in_block: bool
) -> int:
    """Measure every peer at every point; write layer.csv, decode.csv, environment.json, layer.png; print tables.

    Raises:
        FileExistsError: the folder holds results already.
    """
    stopwatch, dtype, about = measure.begin(
        output, ("layer.csv", "decode.csv", "layer.png"), DTYPES[dtype_name] if dtype_name else None, seconds
    )

    decode_rows: list[Row] = []
    decode_csv = report.CsvFile(output / "decode.csv", report.DECODE_COLUMNS)
    layers = dict.fromkeys((sizes.d_model, sizes.d_h, sizes.d_e) for sizes in points)
    for (d_model, d_h, d_e), tokens in itertools.product(layers, DECODE_TOKENS):
        measure.say(f"decoding {tokens} tokens, d_model {d_model}, d_h {d_h}, d_e {d_e}: flash_mhf_op")
        decode_rows.append(_decode_row(Sizes(tokens, 1, d_model, d_h, d_e), dtype, stopwatch) | about)
        decode_csv.write(decode_rows[-1])
        measure.release(stopwatch.device)
    decode_csv.close()

    rows: list[Row] = []
    layer_csv = report.CsvFile(output / "layer.csv", report.LAYER_COLUMNS)
    for sizes in points:
        ceiling = measure.gemm_flops_per_s(dtype, stopwatch)
        for peer in peers:
            started = time.perf_counter()
            number = f"[{len(rows) + 1}/{len(points) * len(peers)}]"
            measure.say(f"{number} L {sizes.length}, d_model {sizes.d_model}, d_h {sizes.d_h}: {peer.name}")
            rows.append(_layer_row(peer, sizes, dtype, ceiling, stopwatch, in_block) | about)
            layer_csv.write(rows[-1])
            measure.release(stopwatch.device)
            measure.say(f"    {rows[-1]['status']}, {time.perf_counter() - started:.1f} s")
    layer_csv.close()

    print(report.layer_tables(rows), report.decode_table(decode_rows), sep="\n\n", flush=True)
    failed = [row for row in rows + decode_rows if row["status"].startswith("failed")]
    try:
        report.plot(output / "layer.csv", output / "layer.png")
    except ImportError:
        measure.say(f"{report.PLOT_NEEDS}; then: mhf bench layer --plot_from {output / 'layer.csv'}")
    except ValueError as error:
        measure.say(f"no plot: {error}")
    measure.say(f"results: {output}")
    return 1 if failed else 0


def _layer_row(
    peer: Peer, sizes: Sizes, dtype: torch.dtype, ceiling: float, stopwatch: Stopwatch, in_block: bool
) -> Row:
    """Measure one peer at one point; what goes wrong becomes the row's status."""
    is_mhf = peer.family != "swiglu"
    row: Row = {
        "peer": peer.name,
        "status": "ok",
        "in_block": "yes" if in_block else "",
        "batch": sizes.batch,
        "L": sizes.length,
        "tokens": sizes.tokens,
        "d_model": sizes.d_model,
        "d_h": sizes.d_h,
        "num_heads": sizes.num_heads if is_mhf else "",
        "num_subnetworks": sizes.num_subnetworks if is_mhf else "",
        "d_e": sizes.d_e if is_mhf else "",
        "d_ff": peer.d_ff(sizes),
        "backend": "",
        "gemm_tflops": ceiling / 1e12,
    }
    unavailable = peer.unavailable(stopwatch.device)
    if unavailable is not None:
        return row | {"status": unavailable}
    stage = "building"
    try:
        with measure.out_of_memory():
            module = peer.module(sizes, stopwatch.device, dtype, in_block)
            inputs = peer.inputs(sizes, stopwatch.device, dtype)
        row["parameters"] = sum(weight.numel() for weight in module.parameters())
        if peer.name.startswith("flash_mhf"):
            row["backend"] = _backend(sizes, stopwatch.device, dtype)
        stage = "inference"
        row |= measure.inference_cost(module, inputs, stopwatch)
        stage = "training"
        row |= measure.training_cost(module, inputs, stopwatch)
    except OutOfMemoryError:
        row["status"] = f"OOM in {stage}"
    except Exception as error:  # a peer that fails must not cost the results of the others
        lines = [type(error).__name__, *str(error).strip().splitlines()]
        if peer.package and isinstance(error, ImportError):  # something that the package needs
            row["status"] = f"not installed: {error}"
        else:
            row["status"] = f"failed in {stage}: {': '.join(lines[:2])}"
    flops = peer.forward_flops(sizes)
    for name, factor in (("forward", 1), ("backward", 2), ("forward_backward", 3)):
        if f"{name}_ms" in row:
            row[f"{name}_share"] = factor * flops / (row[f"{name}_ms"] / 1e3) / ceiling
    return row


def _decode_row(sizes: Sizes, dtype: torch.dtype, stopwatch: Stopwatch) -> Row:
    """Measure the bare op with few tokens, over weight sets that together are several times the L2 cache."""
    row: Row = {
        "status": "ok",
        "tokens": sizes.tokens,
        "d_model": sizes.d_model,
        "d_h": sizes.d_h,
        "num_heads": sizes.num_heads,
        "num_subnetworks": sizes.num_subnetworks,
        "d_e": sizes.d_e,
    }
    device = stopwatch.device
    weights_bytes = 3 * sizes.d_model * sizes.mhf_d_ff * dtype.itemsize
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = max(2, math.ceil(4 * l2_bytes / weights_bytes))
    rounds = math.ceil(DECODE_CALLS / sets)
    op = PEERS["flash_mhf_op"]
    try:
        with torch.no_grad(), measure.out_of_memory():
            q, r = op.inputs(sizes, device, dtype)
            modules = [op.module(sizes, device, dtype) for _ in range(sets)]

            def calls() -> None:
                for _ in range(rounds):
                    for module in modules:
                        module(q, r)

            row["backend"] = _backend(sizes, device, dtype)
            seconds = stopwatch.median(measure.as_graph(calls) if device.type == "cuda" else calls) / (rounds * sets)
            copied = measure.copy_bytes_per_s(stopwatch)
    except OutOfMemoryError:
        return row | {"status": "OOM"}
    except Exception as error:  # as in _layer_row
        return row | {"status": f"failed: {type(error).__name__}: {error}".splitlines()[0]}
    moved = weights_bytes / seconds
    return row | {
        "microseconds": seconds * 1e6,
        "weights_mib": weights_bytes / 2**20,
        "weight_sets": sets,
        "gb_per_s": moved / 1e9,
        "copy_share": moved / copied,
        "copy_gb_per_s": copied / 1e9,
    }


def _backend(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> str:
    """Name the backend that the dispatcher picks for these sizes."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=of)

    heads, subnetworks = sizes.num_heads, sizes.num_subnetworks
    k, u, v = (empty(heads, subnetworks, sizes.d_e, sizes.d_h) for _ in range(3))
    q = empty(sizes.batch, sizes.length, heads, sizes.d_h)
    r = empty(sizes.batch, sizes.length, heads, subnetworks, of=torch.float32)
    return dispatch.select(q, k, u, v, r).name


def _draw(csv_path: Path, png_path: Path) -> int:
    try:
        report.plot(csv_path, png_path)
    except ImportError as error:
        raise ImportError(report.PLOT_NEEDS) from error
    print(png_path)
    return 0
