"""`mhf bench model`: inference latency and training step of whole models, side by side in one run. No Lightning."""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from mhf_kernels import FlashMHF
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from mhf_lightning.bench import measure, report
from mhf_lightning.bench.measure import OutOfMemoryError, Stopwatch
from mhf_lightning.bench.peers import UnfusedMHF
from mhf_lightning.bench.report import Row
from mhf_lightning.model import Decoder, DecoderConfig, count_parameters
from mhf_lightning.model.checkpointing import ActivationCheckpointing
from mhf_lightning.model.loss import LossSums
from mhf_lightning.plan.flops import flops_per_token

LENGTHS = (1024, 2048, 4096, 8192, 16384)
TOKENS = 32_768
SECONDS, QUICK_SECONDS = 3.0, 0.3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

COLUMNS = (
    *("model", "mode", "fully_checkpointed_blocks", "status"),
    *("L", "batch", "num_layers", "parameters", "non_embedding"),
    *("inference_ms", "inference_peak_mib", "step_ms", "tokens_per_s", "step_share", "training_peak_mib"),
    *("gemm_tflops", "device", "dtype", "torch", "triton"),
)
PANELS = {
    "inference_ms": "inference (ms)",
    "tokens_per_s": "training (tokens/s)",
    "inference_peak_mib": "inference peak (MiB)",
    "training_peak_mib": "training peak (MiB)",
}

DESCRIPTION = """\
Measure whole models in one run: latency and peak memory of a forward for the next token, and tokens/s and peak memory
of a training step with AdamW. Models are files such as those of configs/paper; the first is the baseline of the
speed-ups: compiled for inference, compiled with activation checkpointing for training."""


@dataclass(frozen=True)
class Mode:
    """How a model runs: compiled block by block or not, what a block keeps, and the unfused FlashMHF layer.

    As a CUDA graph it costs the host one launch; that is for inference only.
    """

    compiled: bool = False
    graph: bool = False
    checkpointing: ActivationCheckpointing = "none"
    fully_checkpointed_blocks: int = 0
    unfused: bool = False


MODES = {
    "eager": Mode(),
    "compiled": Mode(compiled=True),
    "compiled_graph": Mode(compiled=True, graph=True),
    "compiled_selective": Mode(compiled=True, checkpointing="selective"),
    "compiled_ffn": Mode(compiled=True, checkpointing="ffn"),
    "compiled_checkpoint": Mode(compiled=True, checkpointing="full"),
    "unfused": Mode(unfused=True),
}
INFERENCE_BASELINE, TRAINING_BASELINE = "compiled", "compiled_checkpoint"


def build_parser() -> argparse.ArgumentParser:
    """The options of `mhf bench model`."""
    parser = argparse.ArgumentParser(
        prog="mhf bench model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", type=Path, nargs="*", metavar="FILE", help="model files; the first is the baseline")
    parser.add_argument("--length", type=int, nargs="+", metavar="L", default=LENGTHS, help="default: 1024 ... 16384")
    parser.add_argument(
        "--tokens", type=int, metavar="N", default=TOKENS, help=f"of a call, B * L (default {TOKENS}); L must divide it"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="sequences of a call, in place of --tokens")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all that can run here")
    parser.add_argument(
        "--fully_checkpointed_blocks",
        type=int,
        default=0,
        metavar="N",
        help="in mode compiled_ffn: first blocks that keep their input only (default 0)",
    )
    parser.add_argument("--only", choices=("inference", "training"), help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the results (default runs/bench-model-DATE-TIME)"
    )
    parser.add_argument(
        "--plot_from", type=Path, metavar="CSV", help="measure nothing; draw this model.csv into model.png beside it"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a model failed for another reason than memory, or 2 for wrong use."""
    args = build_parser().parse_args(argv)
    try:
        if args.plot_from is not None:
            plot(args.plot_from, args.plot_from.parent / "model.png")
            return 0
        return run(args)
    except (ValueError, OSError, ImportError) as error:
        return measure.refuse(error)
    except KeyboardInterrupt:
        measure.say("interrupted; model.csv holds what was measured")
        return 130


def read_model(path: Path) -> DecoderConfig:
    """Return the architecture that a model file describes.

    Raises:
        ValueError: The file cannot be read, or holds no `model.decoder`.
    """
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return DecoderConfig.from_dict(values["model"]["decoder"])
    except (OSError, OmegaConfBaseException, KeyError, TypeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is no model file (see configs/model and configs/paper): {reason}") from error


def read_models(paths: Sequence[Path]) -> dict[str, DecoderConfig]:
    """Return the architectures of model files by the names of the files.

    Raises:
        ValueError: As `read_model`, or two files have the same name.
    """
    models = {path.stem: read_model(path) for path in paths}
    if len(models) < len(paths):
        raise ValueError("two model files have the same name; the table could not tell them apart")
    return models


def run(args: argparse.Namespace) -> int:
    """Measure every model in every mode at every length; write model.csv, environment.json, model.png; print tables.

    Raises:
        ValueError: No model, or a length that does not divide the tokens.
        FileExistsError: The folder holds results already.
    """
    if not args.models:
        raise ValueError("name the model files to compare, the baseline first: configs/paper/1.3b/swiglu.yaml ...")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    for length in args.length:
        if length < 1 or (args.batch is None and args.tokens % length):
            raise ValueError(f"--length {length} does not divide --tokens {args.tokens}, so there is no whole batch")
    models = read_models(args.models)
    least = min(config.num_layers for config in models.values())
    if not 0 <= args.fully_checkpointed_blocks <= least:
        raise ValueError(f"--fully_checkpointed_blocks must be from 0 to {least}, the blocks of the smallest model")
    on_gpu = torch.cuda.is_available()
    modes = args.modes or [name for name, mode in MODES.items() if _can_run(mode, args.only, on_gpu)]
    if not on_gpu and any(MODES[name].graph for name in modes):
        raise ValueError("--modes compiled_graph needs a GPU; use eager or compiled")
    if args.fully_checkpointed_blocks and "compiled_ffn" not in modes:
        raise ValueError("--fully_checkpointed_blocks is for mode compiled_ffn, which --modes leaves out")
    output = args.output or Path(f"runs/bench-model-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    stopwatch, dtype, about = measure.begin(
        output,
        ("model.csv", "model.png"),
        DTYPES[args.dtype] if args.dtype else None,
        QUICK_SECONDS if args.quick else SECONDS,
    )

    cases = [
        (length, name, mode)
        for length in args.length
        for name, config in models.items()
        for mode in sorted(modes, key=list(MODES).index)
        if (not MODES[mode].unfused or _can_be_unfused(config))
        and not (MODES[mode].graph and args.only == "training")
        and (MODES[mode].checkpointing != "ffn" or config.ffn.name == "flash_mhf")  # else the same as "full"
    ]
    rows: list[Row] = []
    file_of_rows = report.CsvFile(output / "model.csv", COLUMNS)
    ceilings: dict[int, float] = {}
    for length, name, mode in cases:
        if length not in ceilings:
            ceilings[length] = measure.gemm_flops_per_s(dtype, stopwatch)
        started = time.perf_counter()
        measure.say(f"[{len(rows) + 1}/{len(cases)}] L {length}: {name}, {mode}")
        how = MODES[mode]
        if how.checkpointing == "ffn":
            how = replace(how, fully_checkpointed_blocks=args.fully_checkpointed_blocks)
        case = _Case(models[name], how, args.batch or args.tokens // length, length, dtype, stopwatch)
        row = {"model": name, "mode": mode} | about | case.row(args.only, ceilings[length])
        rows.append(row)
        file_of_rows.write(row)
        measure.say(f"    {row['status']}, {time.perf_counter() - started:.1f} s")
    file_of_rows.close()

    print(tables(rows), flush=True)
    try:
        plot(output / "model.csv", output / "model.png")
    except ImportError:
        measure.say(f"{report.PLOT_NEEDS}; then: mhf bench model --plot_from {output / 'model.csv'}")
    except ValueError as error:
        measure.say(f"no plot: {error}")
    measure.say(f"results: {output}")
    return 1 if any("failed in" in row["status"] for row in rows) else 0


def _can_run(mode: Mode, only: str | None, on_gpu: bool) -> bool:
    """Checkpointing is for training, and graphs are of inference, on a GPU."""
    if mode.graph:
        return on_gpu and only != "training"
    return mode.checkpointing == "none" or only != "inference"


def _can_be_unfused(config: DecoderConfig) -> bool:
    ffn = config.ffn
    return ffn.name == "flash_mhf" and not ffn.skip_linear and ffn.num_kuv_heads is None and ffn.gate != "softmax"


@dataclass(frozen=True)
class _Case:
    """One model in one mode at one length."""

    config: DecoderConfig
    mode: Mode
    batch: int
    length: int
    dtype: torch.dtype
    stopwatch: Stopwatch

    def row(self, only: str | None, ceiling: float) -> Row:
        """Measure inference and training, each whatever becomes of the other; what goes wrong becomes the status."""
        with torch.device("meta"):
            parameters = count_parameters(Decoder(self.config))
        row: Row = {
            "status": "",
            "L": self.length,
            "batch": self.batch,
            "fully_checkpointed_blocks": self.mode.fully_checkpointed_blocks or "",
            "num_layers": self.config.num_layers,
            "parameters": parameters.total,
            "non_embedding": parameters.non_embedding,
            "gemm_tflops": ceiling / 1e12,
        }
        stages: dict[str, Callable[[], dict[str, float]]] = {}
        if only != "training" and self.mode.checkpointing == "none":  # there is nothing to keep in inference
            stages["inference"] = self._inference
        if only != "inference" and not self.mode.graph:
            stages["training"] = self._training
        problems = []
        for stage, measured in stages.items():
            try:
                row |= measured()
            except OutOfMemoryError:
                problems.append(f"OOM in {stage}")
            except Exception as error:  # a model that fails must not cost the results of the others
                lines = [type(error).__name__, *str(error).strip().splitlines()]
                problems.append(f"failed in {stage}: {': '.join(lines[:2])}")
            measure.release(self.stopwatch.device)
        row["status"] = "; ".join(problems) or "ok"
        if "step_ms" in row:
            flops = flops_per_token(self.config, self.length) * self.batch * self.length
            row["tokens_per_s"] = self.batch * self.length / (row["step_ms"] / 1e3)
            row["step_share"] = flops / (row["step_ms"] / 1e3) / ceiling
        return row

    def _build(self, dtype: torch.dtype) -> Decoder:
        with measure.out_of_memory(), self.stopwatch.device:
            decoder = Decoder(self.config).to(dtype)
        decoder.set_activation_checkpointing(self.mode.checkpointing, self.mode.fully_checkpointed_blocks)
        for block in decoder.blocks:
            layer: Any = block
            if self.mode.unfused:
                assert isinstance(layer.ffn, FlashMHF)
                setattr(layer.ffn, "forward", MethodType(UnfusedMHF.forward, layer.ffn))  # noqa: B010
            if self.mode.compiled:
                layer.compile(fullgraph=True, dynamic=False)
        return decoder

    def _tokens(self) -> Tensor:
        return torch.randint(self.config.vocab_size, (self.batch, self.length), device=self.stopwatch.device)

    def _inference(self) -> dict[str, float]:
        """Logits of the last position, as a prefill computes them; the peak is above weights and tokens."""
        decoder, tokens = self._build(self.dtype).eval(), self._tokens()

        def forward() -> None:
            with torch.no_grad():
                decoder.head(decoder.hidden(tokens)[:, -1])

        with measure.out_of_memory():
            if self.mode.graph:  # whose memory is its own, and taken for good
                return {"inference_ms": 1e3 * self.stopwatch.median(measure.as_graph(forward))}
            cost = {"inference_ms": 1e3 * self.stopwatch.median(forward)}
            if self.stopwatch.device.type == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                forward()
                cost["inference_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return cost

    def _training(self) -> dict[str, float]:
        """Forward, backward and AdamW with float32 weights under autocast; the peak includes weights and optimizer."""
        device = self.stopwatch.device
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # the stopwatch's own
        decoder, tokens = self._build(torch.float32), self._tokens()
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
        autocast = torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

        def step() -> None:
            optimizer.zero_grad()
            with autocast:
                sums = decoder(tokens, tokens)
            assert isinstance(sums, LossSums)
            (sums.nll / tokens.numel()).backward()
            optimizer.step()

        with measure.out_of_memory():
            cost = {"step_ms": 1e3 * self.stopwatch.median(step)}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step()
                cost["training_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return cost


def tables(rows: Iterable[Row]) -> str:
    """One Markdown table for each length, with speed-ups over the first model."""
    headings = {
        "model": "model",
        "mode": "mode",
        "fully_checkpointed_blocks": "full blocks",
        "num_layers": "layers",
        "parameters": "parameters",
        "inference_ms": "inference ms",
        "inference_speedup": "speed-up",
        "inference_peak_mib": "inference peak MiB",
        "step_ms": "step ms",
        "tokens_per_s": "tokens/s",
        "step_share": "of GEMM",
        "training_speedup": "speed-up",
        "training_peak_mib": "training peak MiB",
        "status": "status",
    }
    parts = []
    for length, group in groupby(rows, key=lambda row: row["L"]):
        point = list(group)
        compared = [row | _speedups(row, point) for row in point]
        title = f"L {length}, batch {point[0]['batch']}; GEMM {point[0]['gemm_tflops']:.4g} TFLOP/s"
        parts.append(f"{title}\n\n{report.markdown(headings, compared)}")
    return "\n\n".join(parts)


def _speedups(row: Row, point: list[Row]) -> Row:
    """Compare with the first model, where that was measured: as a CUDA graph with another such."""
    speedups = {}
    inference_baseline = row["mode"] if MODES[row["mode"]].graph else INFERENCE_BASELINE
    for name, mode, time_of in (
        ("inference_speedup", inference_baseline, "inference_ms"),
        ("training_speedup", TRAINING_BASELINE, "step_ms"),
    ):
        baseline = [r for r in point if (r["model"], r["mode"]) == (point[0]["model"], mode) and time_of in r]
        if baseline and time_of in row:
            speedups[name] = baseline[0][time_of] / row[time_of]
    return speedups


def plot(csv_path: Path, png_path: Path) -> None:
    """Draw a model CSV against the length, both axes logarithmic.

    Raises:
        ValueError: The file holds no measured row, or is no result of `mhf bench model`.
        FileExistsError: The image exists.
        ImportError: matplotlib is not installed.
    """
    needed = {"model", "mode", "L", "batch", *report.ABOUT, *PANELS}
    rows = report.read_rows(csv_path, needed, "model.csv of mhf bench model")
    panels = {name: title for name, title in PANELS.items() if any(row[name] != report.NOT_MEASURED for row in rows)}
    if not panels:
        raise ValueError(f"{csv_path} holds no measured row")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 5), layout="constrained")
    curves = list(dict.fromkeys((row["model"], row["mode"]) for row in rows))
    names = list(dict.fromkeys(model for model, _ in curves))
    dashes = ("-", "--", (0, (1, 1)), "-.", (0, (5, 1, 1, 1, 1, 1)), ":", "-")
    styles = dict(zip(MODES, dashes, strict=True))
    line = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (column, title) in zip(line, panels.items(), strict=True):
        for model, mode in curves:
            points = sorted(
                (int(row["L"]), float(row[column]))
                for row in rows
                if (row["model"], row["mode"]) == (model, mode) and row[column] != report.NOT_MEASURED
            )
            panel.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=f"{model}, {mode}",
                color=f"C{names.index(model) % 10}",
                linestyle=styles[mode],
                marker="x" if MODES[mode].unfused else "o",
            )
        panel.set(xscale="log", yscale="log", title=title, xlabel="L")
        ticks = sorted({int(row["L"]) for row in rows})
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.grid(alpha=0.3)
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    first = rows[0]
    tokens = {int(row["batch"]) * int(row["L"]) for row in rows}
    work = f"{tokens.pop()} tokens" if len(tokens) == 1 else f"batch {first['batch']}"
    figure.suptitle(f"{first['device']}, {first['dtype']}, torch {first['torch']}, {work}")
    with png_path.open("xb") as image:
        figure.savefig(image, format="png", dpi=120)
