"""`mhf plan`: takes what `mhf fit` takes, and says what the run would need. Uses Lightning's parser, no Trainer.

Exit codes: 0 it fits, 1 it does not, 2 wrong use.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer import Trainer

from mhf_lightning.data.datamodule import TokenDataModule
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import Manifest
from mhf_lightning.errors import readable_errors
from mhf_lightning.model import count_parameters
from mhf_lightning.parsing import take_allowed_imports
from mhf_lightning.plan.flops import days, flops_per_token
from mhf_lightning.plan.gpus import GPU, find_gpu
from mhf_lightning.plan.memory import PRECISIONS, Step, StrategyName, trace
from mhf_lightning.plan.tracker import PARTS, LiveMemory
from mhf_lightning.training.cli import MHFCLI, PARSER_MODE, TRAINER_DEFAULTS, TrainingParser
from mhf_lightning.training.module import PretrainModule

GIB = 2**30
# Share of a GPU's memory that is left for the CUDA context, NCCL's buffers and fragmentation.
RESERVED = 0.08


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        step: What one rank does.
        parameters: Number of parameters of the model.
        non_embedding: The same without embedding and head.
        tokens_per_step: Tokens of an optimiser step over all ranks.
        flops_per_token: Forward and backward.
        tokens: Tokens of the whole run.
        days: Time for them.
        memory: Bytes of one rank.
        usable: Bytes of a GPU that a run may use.
    """

    step: Step
    parameters: int
    non_embedding: int
    tokens_per_step: int
    flops_per_token: float
    tokens: float
    days: float
    memory: LiveMemory
    usable: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a run may use."""
        return self.memory.peak <= self.usable


class PlanCLI(MHFCLI):
    """Parses as ``mhf fit`` does, and adds the plan's own options; builds the model on the meta device, and no more."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what ``mhf fit`` takes besides, and the plan's options."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(Trainer, "fit", skip=cast(Any, self.subcommands()["fit"]))
        parser.add_argument("--gpu", type=str, required=True, help="Kind of GPU, for instance h100.")
        parser.add_argument(
            "--gpus", type=int | None, default=None, help="Number of GPUs; null takes the trainer's nodes and devices."
        )
        parser.add_argument("--mfu", type=float, default=0.4, help="Share of the peak FLOP/s that training reaches.")
        parser.add_argument(
            "--tokens", type=float | None, default=None, help="Tokens to train on; null takes trainer.max_steps."
        )
        parser.add_argument(
            "--context_length",
            type=int | None,
            default=None,
            help="Tokens of a sequence; null takes the dataset's, where there is one.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without Lightning's warning that arguments were handed over by a caller."""
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        """Nothing is read or written in the run folder."""

    def instantiate_classes(self) -> None:
        """Build the model without memory, and leave the trainer alone."""
        config = self.config.clone()
        config.trainer = self.parser.get_defaults().trainer
        with torch.device("meta"):
            built = self.parser.instantiate(config)
        self.model, self.datamodule = built.model, built.data


def make_plan(options: Any, model: PretrainModule, data: TokenDataModule) -> Plan:
    """Work out the plan.

    Args:
        options: The parsed options of :class:`PlanCLI`.
        model: The model, on the meta device.
        data: The datamodule; its dataset need not exist.

    Raises:
        ValueError: An option is missing or impossible.
    """
    gpu = find_gpu(options.gpu)
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu is {options.mfu}; it must be above 0 and at most 1")
    gpus = _devices(options.trainer) if options.gpus is None else options.gpus
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}; it must be at least 1")
    for name, value in (
        ("--tokens", options.tokens),
        ("trainer.max_steps", options.trainer.max_steps if options.tokens is None else None),
        ("--context_length", options.context_length),
        ("trainer.accumulate_grad_batches", options.trainer.accumulate_grad_batches),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value:g}; it must be at least 1")
    decoder = model.decoder.config
    strategy = _strategy(options.trainer.strategy, gpus)
    model.check_compiling(
        zero_stage_3=strategy["strategy"] == "zero3", tensor_parallel=strategy.get("tensor_parallel", 1)
    )
    step = Step(
        decoder,
        data.micro_batch_size,
        options.context_length or _context_length(data.path),
        accumulate=options.trainer.accumulate_grad_batches,
        precision=_precision(options.trainer.precision),
        activation_checkpointing=model.activation_checkpointing,
        fully_checkpointed_blocks=model.fully_checkpointed_blocks,
        compile_blocks=model.compile_blocks,
        document_masking=data.document_masking,
        **strategy,
    )
    tokens_per_step = step.micro_batch_size * step.context_length * step.accumulate * step.data_parallel
    flops = flops_per_token(decoder, step.context_length)
    tokens = options.tokens or options.trainer.max_steps * tokens_per_step
    return Plan(
        step,
        *count_parameters(model.decoder),
        tokens_per_step=tokens_per_step,
        flops_per_token=flops,
        tokens=tokens,
        days=days(tokens, flops, gpus, gpu.bf16_flops, options.mfu),
        memory=trace(step, large_workspace=gpu.large_workspace),
        usable=gpu.memory_gib * GIB * (1 - RESERVED),
    )


def _devices(trainer: Any) -> int:
    devices = trainer.devices
    if isinstance(devices, list):
        devices = len(devices)
    if not str(devices).isdigit() or int(devices) < 1:
        raise ValueError(f"trainer.devices is {devices}, which is no number of GPUs; give --gpus")
    return int(devices) * int(trainer.num_nodes)


def _precision(precision: Any) -> str:
    precision = precision or "bf16-mixed"
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision is {precision}; mhf plan knows {', '.join(PRECISIONS)}")
    return str(precision)


def _context_length(path: str) -> int:
    try:
        return Manifest.load(path).context_length
    except DataError as error:
        raise ValueError(f"there is no dataset at data.path {path} to take it from: give --context_length") from error


def _strategy(strategy: Any, gpus: int) -> dict[str, Any]:
    """Return what ``Step`` wants to know of ``trainer.strategy``; the number of GPUs decides the data-parallel size."""
    if strategy in ("auto", "ddp"):
        name: StrategyName = "ddp" if gpus > 1 or strategy == "ddp" else "single"
        return {"strategy": name, "data_parallel": gpus}
    arguments = strategy.get("init_args", Namespace()) if isinstance(strategy, Namespace) else Namespace()
    kind = strategy.class_path.rpartition(".")[2] if isinstance(strategy, Namespace) else strategy
    if kind == "MHFDDP":
        return {"strategy": "ddp", "data_parallel": gpus}
    if kind == "MHFFSDP2":
        size = arguments.tensor_parallel_size
        if size < 1 or gpus % size:
            raise ValueError(f"tensor_parallel_size is {size}; it must divide the number of GPUs, which is {gpus}")
        return {"strategy": "fsdp2", "data_parallel": gpus // size, "tensor_parallel": size}
    if kind == "MHFDeepSpeed":
        if arguments.stage not in (2, 3):
            raise ValueError(f"stage is {arguments.stage}; it must be 2 or 3")
        zero = (arguments.config or {}).get("zero_optimization", {})
        sizes = {"zero_bucket": "reduce_bucket_size", "zero_live": "stage3_max_live_parameters"}
        given = {ours: int(zero[theirs]) for ours, theirs in sizes.items() if theirs in zero}
        return {"strategy": f"zero{arguments.stage}", "data_parallel": gpus, **given}
    raise ValueError(f"trainer.strategy is {kind}; mhf plan knows auto, ddp, MHFDDP, MHFFSDP2 and MHFDeepSpeed")


def show(plan: Plan, gpu: GPU, name: str, mfu: float) -> None:
    """Print the plan as two tables."""
    from rich.console import Console
    from rich.table import Table

    step = plan.step
    ranks = f"{step.data_parallel * step.tensor_parallel:,} x {name}"
    if step.tensor_parallel > 1:
        ranks += f" ({step.data_parallel} data-parallel x {step.tensor_parallel} tensor-parallel)"
    run = Table("", "value", title="run")
    run.add_row("model", f"{step.decoder.ffn.name}, {step.decoder.num_layers} layers, d_model {step.decoder.d_model}")
    run.add_row("parameters", f"{plan.parameters:,} ({plan.non_embedding:,} without embeddings)")
    run.add_row("GPUs", ranks)
    run.add_row("strategy", f"{step.strategy}, {step.precision}")
    compiled = "compiled" if step.compile_blocks else "eager"
    full = f", the first {step.fully_checkpointed_blocks} full" if step.fully_checkpointed_blocks else ""
    run.add_row("blocks", f"{compiled}, activation checkpointing {step.activation_checkpointing}{full}")
    shape = f"{step.micro_batch_size} x {step.context_length:,} tokens"
    run.add_row("micro-batch", f"{shape} on each GPU, {step.accumulate} a step")
    run.add_row("tokens per step", f"{plan.tokens_per_step:,}")
    run.add_row("FLOPs per token", f"{plan.flops_per_token:.4g} (forward and backward)")
    run.add_row("steps", f"{math.ceil(plan.tokens / plan.tokens_per_step):,} for {plan.tokens:.4g} tokens")
    run.add_row("days", f"{plan.days:.3g} at an MFU of {mfu:.0%} of {gpu.bf16_flops / 1e12:,.1f} TFLOP/s")

    memory = Table("memory of a GPU, GiB", "at the peak", "largest")
    for part in PARTS:
        memory.add_row(part, *(f"{sizes[part] / GIB:.2f}" for sizes in (plan.memory.at_peak, plan.memory.largest)))
    memory.add_section()
    memory.add_row("peak", f"{plan.memory.peak / GIB:.2f}", "")
    memory.add_row("usable", f"{plan.usable / GIB:.2f}", "", style="dim")
    console = Console()
    console.print(run)
    console.print(memory)


def parse(args: list[str]) -> PlanCLI:
    """Parse the options of ``mhf plan``."""
    return PlanCLI(
        PretrainModule,
        TokenDataModule,
        args=take_allowed_imports(args),
        run=False,
        seed_everything_default=1234,
        save_config_callback=None,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=TrainingParser,
        parser_kwargs={
            "parser_mode": PARSER_MODE,
            "prog": "mhf plan",
            "description": "Work out memory, FLOPs and days of a run; takes the options of mhf fit, and a few more.",
            "usage": "mhf plan --gpu NAME [--gpus N] [--config FILE ...] [options]",
        },
    )


def main(args: list[str]) -> int:
    """Run ``mhf plan``; returns the exit code."""
    with readable_errors():
        cli = parse(args)
        options = cast(Any, cli.config)
        plan = make_plan(options, cast(PretrainModule, cli.model), cast(TokenDataModule, cli.datamodule))
        show(plan, find_gpu(options.gpu), options.gpu, options.mfu)
    if plan.fits:
        print(f"fits: {plan.memory.peak / plan.usable:.0%} of what a {options.gpu} can give ({_kept()})")
        return 0
    print(
        f"mhf plan: does not fit: the peak is {plan.memory.peak / GIB:.1f} GiB, a {options.gpu} can give "
        f"{plan.usable / GIB:.1f} GiB ({_kept()}). Lower data.micro_batch_size and raise "
        f"trainer.accumulate_grad_batches, set model.activation_checkpointing to selective, ffn or full, "
        f"or shard with configs/trainer/fsdp2.yaml",
        file=sys.stderr,
    )
    return 1


def _kept() -> str:
    return f"{RESERVED:.0%} are kept for the CUDA context, NCCL and fragmentation"
