"""Peak GPU memory of a training step, by tracing a real one of one rank on fake tensors. Torch and model/ only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.model.checkpointing import ActivationCheckpointing
from mhf_lightning.model.loss import LossSums
from mhf_lightning.model.parallel import shard, split_heads
from mhf_lightning.plan.cuda import (
    LARGE_WORKSPACE,
    SCRATCH,
    SMALL_WORKSPACE,
    CompiledBlocks,
    cuda_kernels,
    fused_loss,
)
from mhf_lightning.plan.tracker import LiveMemory

StrategyName = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
PRECISIONS = ("bf16-mixed", "bf16-true", "32-true")


@dataclass(frozen=True)
class Step:
    """One optimiser step of one rank.

    Attributes:
        decoder: Architecture.
        micro_batch_size: Sequences of a forward pass.
        context_length: Tokens of a sequence.
        accumulate: Micro-batches of a step.
        precision: Lightning's name, one of ``PRECISIONS``.
        activation_checkpointing: What blocks keep for the backward.
        fully_checkpointed_blocks: First blocks that keep their input only.
        compile_blocks: Blocks are compiled; with checkpointing, what they keep is the same as eager.
        document_masking: Attention stays inside a document.
        strategy: How the model is spread.
        data_parallel: Ranks that read different data.
        tensor_parallel: Ranks that share one replica's heads.
        zero_bucket: DeepSpeed's ``reduce_bucket_size``, in elements.
        zero_live: DeepSpeed's ``stage3_max_live_parameters``.
    """

    decoder: DecoderConfig
    micro_batch_size: int
    context_length: int
    accumulate: int = 1
    precision: str = "bf16-mixed"
    activation_checkpointing: ActivationCheckpointing = "none"
    fully_checkpointed_blocks: int = 0
    compile_blocks: bool = False
    document_masking: bool = False
    strategy: StrategyName = "single"
    data_parallel: int = 1
    tensor_parallel: int = 1
    zero_bucket: int = 500_000_000
    zero_live: int = 1_000_000_000


def trace(step: Step, *, large_workspace: bool = True) -> LiveMemory:
    """Run two steps of rank 0 on fake tensors; the second starts with optimiser state.

    Args:
        step: What to run.
        large_workspace: Whether cuBLAS holds the workspace of Hopper and later GPUs.

    Returns:
        The counts of the second step.
    """
    workspace = LARGE_WORKSPACE if large_workspace else SMALL_WORKSPACE
    memory = LiveMemory(step.decoder.vocab_size, workspace, SCRATCH)
    compiled = CompiledBlocks(memory) if step.compile_blocks and step.activation_checkpointing == "none" else None
    with _fake_processes(step) as mesh:
        decoder = _place(step, mesh)  # on the meta device
        with FakeTensorMode(allow_non_fake_inputs=True), memory, cuda_kernels(), fused_loss(memory):
            decoder = decoder.to_empty(device="cpu")
            if mesh is None:  # of what FSDP2 has sharded, to_empty keeps the tie
                decoder.tie_head()
            run = _RUNS[step.strategy](step, decoder, memory)
            if compiled is not None:
                for block in decoder.blocks:
                    if block.activation_checkpointing == "none":
                        compiled.install(block)
            run.step(micro_batches=1)
            memory.forget("activations", "weight copies", "logits")  # what compiling left behind is no memory
            memory.reset_peak()
            run.step(micro_batches=min(step.accumulate, 2))  # all but the first are alike
    return memory


def _place(step: Step, mesh: DeviceMesh | None) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(step.decoder)
    if step.precision == "bf16-true" or (step.strategy in ("zero2", "zero3") and step.precision == "bf16-mixed"):
        decoder.bfloat16()
    decoder.set_activation_checkpointing(step.activation_checkpointing, step.fully_checkpointed_blocks)
    if mesh is not None:
        split_heads(decoder, mesh["tensor_parallel"])
        in_bf16 = step.precision.startswith("bf16")
        shard(decoder, mesh["data_parallel"], torch.bfloat16 if in_bf16 else None)
    return decoder


class _Run:
    """A rank on its own: weights, gradients and optimiser state are whole."""

    def __init__(self, step: Step, decoder: Decoder, memory: LiveMemory) -> None:
        self.config, self.decoder, self.memory = step, decoder, memory
        memory.tag(decoder.parameters(), "weights")
        self.prepare()
        for parameter in self.decoder.parameters():
            parameter.register_post_accumulate_grad_hook(self.on_gradient)
        self.optimizer = torch.optim.AdamW(self.owned(), lr=1e-3, fused=True)
        self.batch = self._batch()

    def prepare(self) -> None:
        """Allocate what the strategy holds all the time."""

    def owned(self) -> list[nn.Parameter]:
        """Return what the optimiser updates."""
        return list(self.decoder.parameters())

    def on_gradient(self, parameter: Tensor) -> None:
        """Count a gradient that is complete."""
        self.memory.tag([parameter.grad], "gradients")

    def step(self, micro_batches: int) -> None:
        """Run in the order of the training module: old gradients are dropped before the forward."""
        self.decoder.zero_grad()  # what a strategy holds outside of parameters, it frees itself
        for micro_batch in range(micro_batches):
            with self.autocast():
                sums = self.decoder(**self.batch)
            assert isinstance(sums, LossSums)
            loss = sums.nll / self.batch["labels"].numel()
            del sums
            self.backward(loss, is_last=micro_batch == micro_batches - 1)
            del loss
            if micro_batch < micro_batches - 1:
                self.memory.move("activations", "gradients")  # unsharded ones: nothing else outlives a backward
        self.update()

    def autocast(self) -> Any:
        """Return the context of the forward; as Lightning's, it casts a weight again at each use."""
        mixed = self.config.precision == "bf16-mixed"
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if mixed else nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Run the backward of a micro-batch."""
        loss.backward()

    def update(self) -> None:
        """Run the optimiser. Norm and clipping take some scalars: gradients are scaled in place."""
        self.optimizer.step()
        self.memory.tag((x for state in self.optimizer.state.values() for x in state.values()), "optimiser")

    def _batch(self) -> dict[str, Tensor]:
        shape = self.config.micro_batch_size, self.config.context_length
        keys = ["input_ids", "labels"] + ["position_ids", "document_ids"] * self.config.document_masking
        return {key: torch.zeros(shape, dtype=torch.int64) for key in keys}


class _DDPRun(_Run):
    """Buckets live as long as the run; a step's gradients move into them in its last backward."""

    def prepare(self) -> None:
        self.buckets: dict[Tensor, Tensor] = {p: torch.empty_like(p) for p in self.decoder.parameters()}
        self.memory.tag(self.buckets.values(), "gradients")

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.is_last = is_last
        loss.backward()

    def on_gradient(self, parameter: Tensor) -> None:
        if self.is_last:
            parameter.grad = self.buckets[parameter]
        else:
            super().on_gradient(parameter)


class _FSDP2Run(_Run):
    """The real FSDP2 and tensor parallelism, in a fake process group."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.decoder.set_requires_gradient_sync(is_last)  # type: ignore[operator] # an FSDPModule now
        loss.backward()


class _ZeRO2Run(_Run):
    """DeepSpeed's buffers, from reading DeepSpeed 0.19 rather than from running it; the model is traced as ever."""

    def prepare(self) -> None:
        numel = sum(p.numel() for p in self.decoder.parameters())
        self.share = -(-numel // self.config.data_parallel)
        self.bucket_numel = self.config.zero_bucket
        self.collected: Tensor | None = None
        self.master = nn.Parameter(torch.empty(self.share))
        self.memory.tag([self.master], "optimiser")

    def owned(self) -> list[nn.Parameter]:
        return [self.master]

    def on_gradient(self, parameter: Tensor) -> None:
        if self.collected is None:
            self.collected, self.filled = self.bucket(), 0
            self.memory.tag([self.collected], "gradients")
        elif self.filled + parameter.numel() > self.bucket_numel:
            self.reduce()
        self.filled += parameter.numel()
        parameter.grad = None  # copied into the bucket

    def autocast(self) -> Any:
        return nullcontext()  # weights are bfloat16

    def bucket(self) -> Tensor:
        """Return what gradients are collected in, from the first one of a backward on."""
        return torch.empty(self.bucket_numel, dtype=self.decoder.embedding.weight.dtype)

    def reduce(self) -> None:
        """Add this rank's part of the bucket, which is reduced in float32, to its gradients."""
        if self.master.grad is None:
            self.master.grad = torch.empty(self.share)
        self.memory.tag([self.master.grad, torch.empty(self.filled)], "gradients")
        self.filled = 0

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()
        self.reduce()
        self.collected = None

    def update(self) -> None:
        super().update()
        self.master.grad = None


class _ZeRO3Run(_ZeRO2Run):
    """Weights are sharded, but DeepSpeed keeps up to ``zero_live`` gathered ones; its bucket lives all the time."""

    def prepare(self) -> None:
        super().prepare()
        weights = list(self.decoder.parameters())
        numel = self.share + min(sum(p.numel() for p in weights), self.config.zero_live)
        self.memory.ignore(weights)
        self.weights = torch.empty(numel, dtype=weights[0].dtype)
        self.memory.tag([self.weights], "weights")
        self.buffer = torch.empty(self.bucket_numel)
        self.memory.tag([self.buffer], "gradients")

    def bucket(self) -> Tensor:
        return self.buffer

    def update(self) -> None:
        _Run.update(self)  # its gradients' buffer stays


_RUNS: dict[str, type[_Run]] = {
    "single": _Run,
    "ddp": _DDPRun,
    "fsdp2": _FSDP2Run,
    "zero2": _ZeRO2Run,
    "zero3": _ZeRO3Run,
}


@contextmanager
def _fake_processes(step: Step) -> Iterator[DeviceMesh | None]:
    """Start a process group that answers at once and moves nothing; None where the strategy needs none."""
    if step.strategy != "fsdp2":
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = step.data_parallel * step.tensor_parallel
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        names = ("data_parallel", "tensor_parallel")
        yield init_device_mesh("cpu", (step.data_parallel, step.tensor_parallel), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()
