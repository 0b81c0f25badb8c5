"""`mhf bench generate`: prefill and decode speed of whole models, side by side in one run. No Lightning."""

from __future__ import annotations

import argparse
import datetime
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from mhf_lightning.bench import measure, report
from mhf_lightning.bench.measure import OutOfMemoryError, Stopwatch
from mhf_lightning.bench.model import DTYPES, read_models
from mhf_lightning.bench.report import Row
from mhf_lightning.model import Decoder, DecoderConfig, count_parameters
from mhf_lightning.model.generate import Generation

BATCHES, PROMPT, NEW_TOKENS = (1, 16), 1024, 256
SECONDS, QUICK_SECONDS = 3.0, 0.3
MODES = ("eager", "graph", "compiled")

COLUMNS = (
    *("model", "mode", "status", "batch", "prompt", "new_tokens", "num_layers", "parameters"),
    *("prefill_ms", "prefill_tokens_per_s", "decode_ms", "decode_tokens_per_s", "peak_mib"),
    *("device", "dtype", "torch", "triton"),
)

DESCRIPTION = """\
Measure generation with whole models in one run: reading prompts, and adding tokens to them one by one from a key/value
cache, always the most likely one. Models are files such as those of configs/paper, their weights random; the first is
the baseline of the speed-ups. Modes: eager; graph, the step as a CUDA graph; compiled, the step compiled block by
block, and on a GPU also as a CUDA graph. The prompt is always read eagerly."""


def build_parser() -> argparse.ArgumentParser:
    """The options of `mhf bench generate`."""
    parser = argparse.ArgumentParser(
        prog="mhf bench generate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="FILE", help="model files; the first is the baseline")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", default=BATCHES, help="sequences; default: 1 16")
    parser.add_argument("--prompt", type=int, metavar="L", default=PROMPT, help=f"tokens read (default {PROMPT})")
    parser.add_argument(
        "--new_tokens", type=int, metavar="N", default=NEW_TOKENS, help=f"tokens added (default {NEW_TOKENS})"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all; without a GPU eager and compiled")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the results (default runs/bench-generate-DATE-TIME)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a model failed for another reason than memory, or 2 for wrong use."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        return measure.refuse(error)
    except KeyboardInterrupt:
        measure.say("interrupted; generate.csv holds what was measured")
        return 130


def run(args: argparse.Namespace) -> int:
    """Measure every model in every mode at every batch; write generate.csv and environment.json; print tables.

    Raises:
        ValueError: A size is too small, or a mode needs a GPU.
        FileExistsError: The folder holds results already.
    """
    if min(*args.batch, args.prompt) < 1 or args.new_tokens < 2:
        raise ValueError(
            "--batch and --prompt must be at least 1, --new_tokens at least 2 (the prompt gives the first)"
        )
    modes = args.modes or [mode for mode in MODES if mode != "graph" or torch.cuda.is_available()]
    if "graph" in modes and not torch.cuda.is_available():
        raise ValueError("--modes graph needs a GPU; use eager or compiled")
    models = read_models(args.models)
    output = args.output or Path(f"runs/bench-generate-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    stopwatch, dtype, about = measure.begin(
        output, ("generate.csv",), DTYPES[args.dtype] if args.dtype else None, QUICK_SECONDS if args.quick else SECONDS
    )

    rows: list[Row] = []
    file_of_rows = report.CsvFile(output / "generate.csv", COLUMNS)
    cases = list(itertools.product(args.batch, models.items(), modes))
    for batch, (name, config), mode in cases:
        started = time.perf_counter()
        measure.say(f"[{len(rows) + 1}/{len(cases)}] batch {batch}: {name}, {mode}")
        row = {
            "model": name,
            "mode": mode,
            "batch": batch,
            "prompt": args.prompt,
            "new_tokens": args.new_tokens,
        } | about
        rows.append(row | _measure(config, mode, batch, args.prompt, args.new_tokens, dtype, stopwatch))
        file_of_rows.write(rows[-1])
        measure.release(stopwatch.device)
        measure.say(f"    {rows[-1]['status']}, {time.perf_counter() - started:.1f} s")
    file_of_rows.close()
    print(tables(rows), flush=True)
    measure.say(f"results: {output}")
    return 1 if any(row["status"].startswith("failed") for row in rows) else 0


@torch.no_grad()
def _measure(
    config: DecoderConfig, mode: str, batch: int, length: int, new_tokens: int, dtype: torch.dtype, stopwatch: Stopwatch
) -> Row:
    """Measure one model in one mode; what goes wrong becomes the row's status."""
    device = stopwatch.device
    with torch.device("meta"):
        row: Row = {"parameters": count_parameters(Decoder(config)).total, "num_layers": config.num_layers}
    try:
        with measure.out_of_memory():
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # the stopwatch's own
            with device:
                decoder = Decoder(config).to(dtype).eval()
            generation = Generation(decoder, batch, length + new_tokens)
            prompts = list(torch.randint(config.vocab_size, (batch, length), device=device))
            tokens = torch.zeros(batch, dtype=torch.int64, device=device)
            advance = _advance(generation, tokens, mode)

            @torch.compiler.set_stance("force_eager")
            def prefill() -> None:
                tokens.copy_(generation.prefill(prompts).argmax(-1))

            def decode() -> None:
                for _ in range(new_tokens - 1):
                    advance()

            prefill_s, decode_s, _ = stopwatch.medians(prefill, decode)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                prefill()
                decode()
                row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    except OutOfMemoryError:
        return row | {"status": "OOM"}
    except Exception as error:  # a model that fails must not cost the results of the others
        lines = [type(error).__name__, *str(error).strip().splitlines()]
        return row | {"status": f"failed: {', '.join(lines[:2])}"}
    steps = new_tokens - 1
    return row | {
        "status": "ok",
        "prefill_ms": 1e3 * prefill_s,
        "prefill_tokens_per_s": batch * length / prefill_s,
        "decode_ms": 1e3 * decode_s / steps,
        "decode_tokens_per_s": batch * steps / decode_s,
    }


def _advance(generation: Generation, tokens: torch.Tensor, mode: str) -> Callable[[], object]:
    """Return what adds a token to every sequence: reads ``tokens [B]`` and puts the most likely next ones there.

    ``compiled`` compiles the decoder's blocks for good: one program serves all of them, where the whole step would take
    some twenty times as long to compile.
    """
    if mode == "compiled":
        for block in generation.decoder.blocks:
            block.compile(fullgraph=True)

    def advance() -> None:
        tokens.copy_(generation.step(tokens).argmax(-1))

    return measure.as_graph(advance) if mode != "eager" and tokens.is_cuda else advance


def tables(rows: Iterable[Row]) -> str:
    """One Markdown table for each batch, with speed-ups over the first model in the same mode."""
    headings = {
        "model": "model",
        "mode": "mode",
        "num_layers": "layers",
        "parameters": "parameters",
        "prefill_ms": "prefill ms",
        "prefill_tokens_per_s": "tokens/s",
        "prefill_speedup": "speed-up",
        "decode_ms": "ms per token",
        "decode_tokens_per_s": "tokens/s",
        "decode_speedup": "speed-up",
        "peak_mib": "peak MiB",
        "status": "status",
    }
    parts = []
    for batch, group in groupby(rows, key=lambda row: row["batch"]):
        point = list(group)
        compared = [row | _speedups(row, point) for row in point]
        title = f"batch {batch}, prompt {point[0]['prompt']}, {point[0]['new_tokens']} new tokens"
        parts.append(f"{title}\n\n{report.markdown(headings, compared)}")
    return "\n\n".join(parts)


def _speedups(row: Row, point: list[Row]) -> Row:
    baseline = next(other for other in point if other["mode"] == row["mode"])  # models come in order
    return {
        f"{phase}_speedup": baseline[f"{phase}_ms"] / row[f"{phase}_ms"]
        for phase in ("prefill", "decode")
        if f"{phase}_ms" in row and f"{phase}_ms" in baseline
    }
