"""What CUDA kernels do otherwise than the CPU's, for steps traced on fake CPU tensors. Torch, mhf_kernels and model/.

Autograd refuses CUDA tensors, fake ones too, in a build of PyTorch without CUDA. So a step is traced on the CPU, and
the few operations whose memory differs are replaced here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mhf_kernels  # noqa: F401 - registers torch.ops.mhf
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.distributed.tensor import DTensor

from mhf_lightning.model import loss
from mhf_lightning.plan.tracker import LiveMemory

RMS_NORM = F.rms_norm

# Bytes that cuBLAS holds: 32 MiB on Hopper and later, else 8.1 MiB, for the forward's thread and for autograd's each.
LARGE_WORKSPACE = 2 * 32 * 2**20
SMALL_WORKSPACE = 2 * (2 * 4096 + 8 * 16) * 2**10


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Run RMSNorm as CUDA does: one fused operation that saves its input and a number a row; float32 in autocast.

    The function is replaced for all of the process: autograd, which runs forwards again, leaves PyTorch's modes.
    """
    with mock.patch.object(F, "rms_norm", _rms_norm):
        yield


@contextmanager
def fused_loss(memory: LiveMemory) -> Iterator[None]:
    """Count the chunks of the loss as a GPU runs them: no float32 logits, and no product beside the sum it goes to."""

    def fused(function: Callable[..., Any], _device_type: str) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            with memory.fusing(KERNELS):
                return function(*args)

        return run

    def add_product(*_: Tensor) -> None:
        """Take no memory; a Mock would keep its arguments."""

    with mock.patch.object(loss, "fused", fused), mock.patch.object(loss, "add_product", add_product):
        yield


class CompiledBlocks:
    """Runs blocks by the graphs that torch.compile would make of them: AOTAutograd with Inductor's decompositions.

    Which tensors the forward keeps is decided by the partitioner that Inductor uses. All blocks share the graphs.
    """

    def __init__(self, memory: LiveMemory) -> None:
        self.memory = memory
        self._compiled: Any = None

    def install(self, block: nn.Module) -> None:
        """Run this block so from now on."""
        inner = _Inner(block)
        names = [name for name, _ in inner.named_parameters()]

        def traced(parameters: list[Tensor], *args: Any) -> Any:
            with mock.patch.object(F, "rms_norm", RMS_NORM):  # Inductor takes it apart
                return torch.func.functional_call(inner, dict(zip(names, parameters, strict=True)), args)

        def forward(*args: Any) -> Any:
            if self._compiled is None:
                self._compiled = aot_function(
                    traced,
                    fw_compiler=self._fused,
                    bw_compiler=self._fused,
                    partition_fn=_partition,
                    decompositions=select_decomp_table(),
                )
            return self._compiled([parameter for _, parameter in block.named_parameters()], *args)

        block.forward = forward

    def _fused(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        def run(args: list[Any]) -> Any:
            with self.memory.fusing(KERNELS):
                return torch.fx.Interpreter(gm).boxed_run(args)

        run._boxed_call = True  # type: ignore[attr-defined] # AOTAutograd hands over its references
        return run


def _partition(joint: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Split a joint graph as Inductor does; Dynamo, left out here, would have numbered the checkpointed region."""
    for node in joint.graph.nodes:
        if "recompute" in node.meta:
            node.meta["ac_graph_id"] = 0
    return min_cut_rematerialization_partition(joint, *args, **kwargs)


class _Inner(nn.Module):
    """A block without the hooks that FSDP2 puts around its forward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.eager = block, block.forward

    def forward(self, *args: Any) -> Any:
        return self.eager(*args)


def _rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if isinstance(x, DTensor):
        local = _rms_norm(x.to_local(), shape, weight, eps)
        return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False)
    if torch.is_autocast_enabled("cpu"):
        x, weight = x.float(), None if weight is None else weight.float()
    return _FusedRMSNorm.apply(x, weight)


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _attention_backward(grad: Tensor, q: Tensor, *_: Any, **__: Any) -> int:
    """FlashAttention-2 sums dQ, and keeps one number a row, in float32; lengths are padded to 128."""
    batch, heads, length, d_head = q.shape
    return batch * heads * -(-length // 128) * 128 * (-(-d_head // 32) * 32 + 1) * 4


def _gate(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """R, in float32."""
    return math.prod(q.shape[:3]) * k.shape[1] * 4


def _gate_backward(_grad: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """R and dR."""
    return 2 * _gate(q, k)


# What Inductor calls as a kernel; all else it fuses.
KERNELS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        torch.ops.mhf.flash_mhf.default,
        torch.ops.mhf.flash_mhf_backward.default,
        torch.ops.mhf.flash_mhf_routed.default,
        torch.ops.mhf.flash_mhf_routed_backward.default,
    }
)

SCRATCH: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    torch.ops.mhf.flash_mhf_routed.default: _gate,
    torch.ops.mhf.flash_mhf_routed_backward.default: _gate_backward,
}
