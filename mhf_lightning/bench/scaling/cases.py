"""What `mhf bench scaling` measures: a case is one training by one strategy on some GPUs. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

# By importance. `single` is the one process that efficiency and parity refer to.
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3", "fsdp2_tp")
DEEPSPEED = ("zero2", "zero3")
SHARDED = ("single", "ddp", "fsdp2", "fsdp2_tp")  # they read each other's checkpoints
STAGES = ("preflight", "weak", "parity", "checkpoint", "fixed")
TENSOR_PARALLEL = 2
SEED = 1234  # of the weights, and of the tokens and their order
# Peak. Small: near the largest that a model bears, each step multiplies the rounding of the one before, and in bfloat16
# the gradient norms of 50 steps differ by tens of per cent where nothing is wrong.
LEARNING_RATE = 5e-5
WARMUP = 5
PARITY_STEPS, PARITY_LAYERS = 50, 4
CHECKPOINT_STEPS = 1000  # more than it takes to write a checkpoint in the background


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        stage: One of `STAGES`.
        model: Path of the model file.
        strategy: One of `STRATEGIES`, or ``single``.
        gpus: Processes, a GPU each.
        micro_batch: Sequences of a forward pass on each data-parallel rank.
        accumulate: Forward passes of an optimiser step.
        length: Tokens of a sequence.
        steps: Optimiser steps in all.
        warmup: The first of them, which are not measured.
        precision: Lightning's name.
        compiled: Blocks are compiled.
        lr: Peak learning rate.
        layers: Number of blocks; None takes the model's.
        save_at: Steps after which a checkpoint is saved, and whether in the background. Each save waits until the one
            before it is on disk: then its step is the earliest.
        kill: The last rank kills itself when the last of these checkpoints is on disk.
        resume: Label of the case whose newest checkpoint this one continues.
        stop_after: Steps after which a continued training ends; None goes on to the end.
    """

    stage: str
    model: str
    strategy: str
    gpus: int
    micro_batch: int
    accumulate: int
    length: int
    steps: int
    warmup: int
    precision: str
    compiled: bool
    lr: float
    layers: int | None = None
    save_at: tuple[tuple[int, bool], ...] = ()
    kill: bool = False
    resume: str | None = None
    stop_after: int | None = None

    @property
    def tensor_parallel(self) -> int:
        """Ranks of one replica."""
        return TENSOR_PARALLEL if self.strategy == "fsdp2_tp" else 1

    @property
    def data_parallel(self) -> int:
        """Ranks that read different data."""
        return self.gpus // self.tensor_parallel

    @property
    def global_batch(self) -> int:
        """Sequences of an optimiser step."""
        return self.micro_batch * self.accumulate * self.data_parallel

    @property
    def label(self) -> str:
        """A name that no other case of a run has."""
        return label(self.stage, model_name(self.model), self.strategy, self.gpus, self.continues)

    @property
    def continues(self) -> str | None:
        """Strategy and GPUs of the case that this one continues."""
        return None if self.resume is None else self.resume.rpartition(": ")[2]


def label(stage: str, model: str, strategy: str, gpus: int, continues: str | None = None) -> str:
    """Return the label of the case with these columns in the CSV files."""
    return f"{stage}, {model}: {strategy} on {gpus}" + ("" if continues is None else f", continues {continues}")


def model_name(path: str) -> str:
    """Return the last folder and the stem of a model file's path: ``370m/swiglu``."""
    return "/".join(path.removesuffix(".yaml").split("/")[-2:])


def divisors(number: int) -> list[int]:
    """Return the divisors in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass(frozen=True)
class Sizes:
    """What the cases of a run have in common.

    Attributes:
        models: Paths of model files.
        strategies: Some of `STRATEGIES`.
        processes: Numbers of GPUs.
        micro_batch: Sequences of a forward pass for each GPU.
        global_batch: Sequences of an optimiser step where that is fixed.
        length: Tokens of a sequence.
        steps: Measured steps.
        precision: Lightning's name.
        compiled: Blocks are compiled, but under ZeRO-3, which cannot.
    """

    models: Sequence[str]
    strategies: Sequence[str]
    processes: Sequence[int]
    micro_batch: int
    global_batch: int
    length: int
    steps: int
    precision: str
    compiled: bool

    def case(self, stage: str, model: str, strategy: str, gpus: int) -> Case:
        """Return a case in which every GPU has `micro_batch` sequences a step."""
        case = Case(
            stage,
            model,
            strategy,
            gpus,
            micro_batch=self.micro_batch,
            accumulate=1,
            length=self.length,
            steps=WARMUP + self.steps,
            warmup=WARMUP,
            precision=self.precision,
            compiled=self.compiled and strategy != "zero3",
            lr=LEARNING_RATE,
        )
        return replace(case, micro_batch=self.micro_batch * case.tensor_parallel)


def weak(sizes: Sizes) -> list[list[Case]]:
    """The same work for each GPU: one process first, which is what the others are compared with."""
    baselines = [sizes.case("weak", model, "single", 1) for model in sizes.models]
    return [baselines, [sizes.case("weak", model, *way) for way in _ways(sizes) for model in sizes.models]]


def fixed(sizes: Sizes) -> list[list[Case]]:
    """The same sequences a step for all GPUs together.

    Raises:
        ValueError: They cannot be dealt out evenly.
    """

    def case(model: str, strategy: str, gpus: int) -> Case:
        weak_case = sizes.case("fixed", model, strategy, gpus)
        share, rest = divmod(sizes.global_batch, weak_case.data_parallel)
        micro_batch = min(weak_case.micro_batch, share)
        if rest or not micro_batch or share % micro_batch:
            raise ValueError(
                f"--global_batch {sizes.global_batch} does not come apart into micro-batches of "
                f"{weak_case.micro_batch} sequences on {weak_case.data_parallel} data-parallel ranks; "
                f"change it or --micro_batch"
            )
        return replace(weak_case, micro_batch=micro_batch, accumulate=share // micro_batch)

    baselines = [case(model, "single", 1) for model in sizes.models]
    ways = [(strategy, gpus) for strategy, gpus in _ways(sizes) if gpus > 1]
    return [baselines, [case(model, *way) for way in ways for model in sizes.models]]


def _ways(sizes: Sizes) -> Iterable[tuple[str, int]]:
    """Strategies and GPUs."""
    for strategy in sizes.strategies:
        for gpus in sizes.processes:
            # DDP on one GPU is `single`; tensor parallelism needs a pair.
            alone = strategy in ("ddp", "fsdp2_tp") and gpus == 1
            if not alone and not (strategy == "fsdp2_tp" and gpus % TENSOR_PARALLEL):
                yield strategy, gpus


def parity(sizes: Sizes) -> list[list[Case]]:
    """Steps of the same global batch on one GPU, then on all of them; then what was saved on N, continued on M.

    N and M are one and all; by FSDP2 also all and fewer, the most of `processes` that divide all. Where all are one,
    what is left is the arithmetic of the strategies.
    """
    gpus = max(sizes.processes)
    fewer = max((n for n in sizes.processes if 1 < n < gpus and gpus % n == 0), default=0)
    one, every, some = ("single", 1), ("fsdp2", gpus), ("fsdp2", fewer)
    alone, together, continued = [], [], []
    for model in sizes.models:
        cases = {
            way: replace(
                sizes.case("parity", model, *way),
                accumulate=gpus // way[1],
                steps=PARITY_STEPS,
                layers=PARITY_LAYERS,
                save_at=((PARITY_STEPS // 2, False),) if way in (one, every, some) else (),
            )
            for way in (one, *(way for way in _ways(sizes) if way[1] == gpus or way == some))
        }
        alone.append(cases[one])
        together += [case for way, case in cases.items() if way != one]
        pairs = [(one, way) for way in cases if way != one and way[0] in SHARDED and way[1] == gpus]
        continued += [
            replace(cases[way], save_at=(), resume=cases[saved].label)
            for saved, way in [*pairs, (every, one), (every, some), (some, every)]
            if saved in cases and way in cases
        ]
    return [alone, together, continued]


def checkpoint(sizes: Sizes) -> list[list[Case]]:
    """FSDP2 on all GPUs: a save, two in the background, a rank that is killed; and the training that goes on."""
    stages = []
    for model in sizes.models:
        case = replace(sizes.case("checkpoint", model, "fsdp2", max(sizes.processes)), steps=CHECKPOINT_STEPS)
        killed = replace(case, save_at=((WARMUP + 6, False), (WARMUP + 9, True), (WARMUP + 12, True)), kill=True)
        stages += [[killed], [replace(case, resume=killed.label, stop_after=3)]]
    return stages


def left(plan: list[list[Case]], done: set[str]) -> list[list[Case]]:
    """Leave out what is done; but what another case continues is run again, as its checkpoints were not kept.

    Args:
        plan: The cases of a stage.
        done: Labels of cases that have a row. A case that is killed has none: one row stands for it and what follows.
    """
    wanted = [case for cases in plan for case in cases if case.label not in done and not case.kill]
    labels = {case.label for case in wanted} | {case.resume for case in wanted}
    return [[case for case in cases if case.label in labels] for cases in plan]


CASES = {"weak": weak, "fixed": fixed, "parity": parity, "checkpoint": checkpoint}
