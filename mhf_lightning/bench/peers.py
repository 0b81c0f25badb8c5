"""The layers that `mhf bench layer` compares: what a user would pick instead of FlashMHF, and FlashMHF itself.

May import torch and mhf_kernels; liger_kernel and deepspeed where they are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from mhf_kernels import FlashMHF, flash_mhf, router_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D_E = 256


@dataclass(frozen=True)
class Sizes:
    """Sizes of one measurement; the FlashMHF layer and the SwiGLU layer that a model of this width would use.

    SwiGLU has `d_ff = 8/3 d_model` rounded up to a multiple of 64: the rule of the paper's three sizes. FlashMHF has
    sub-networks of `d_e`, as many as it takes to reach that d_ff: with 256, the rule of the released configs. A change
    of d_h alone leaves FLOPs and parameters as they are.

    Raises:
        ValueError: d_model is not a multiple of d_h, or a size is below 1.
    """

    batch: int
    length: int
    d_model: int
    d_h: int
    d_e: int = D_E

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if self.d_model % self.d_h:
            raise ValueError(f"d_model must be a multiple of d_h; got d_model {self.d_model} and d_h {self.d_h}")

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.batch * self.length

    @property
    def num_heads(self) -> int:
        """H of FlashMHF."""
        return self.d_model // self.d_h

    @property
    def swiglu_d_ff(self) -> int:
        """Width of SwiGLU's intermediate."""
        return math.ceil(8 * self.d_model / 3 / 64) * 64

    @property
    def num_subnetworks(self) -> int:
        """E of FlashMHF."""
        return math.ceil(self.swiglu_d_ff / self.d_e)

    @property
    def mhf_d_ff(self) -> int:
        """Width of one FlashMHF head's intermediate, `E * d_e`."""
        return self.num_subnetworks * self.d_e


class SwiGLU(nn.Module):
    """`(SiLU(X W_gate) * (X W_up)) W_down`: the layer of Llama."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, d_model]` to `[B, L, d_model]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CheckpointedSwiGLU(SwiGLU):
    """SwiGLU that keeps its input only, and computes everything else again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, d_model]` to `[B, L, d_model]`."""
        return checkpoint(super().forward, x, use_reentrant=False)


class DeepSpeedTiledSwiGLU(SwiGLU):
    """SwiGLU through DeepSpeed's TiledMLP, with as many tiles as its documentation takes: `ceil(L / d_model)`."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, d_ff)
        self.tiled_mlp = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp").TiledMLP

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, d_model]` to `[B, L, d_model]`."""
        tiles = math.ceil(x.shape[1] / x.shape[2])
        return self.tiled_mlp.apply(SwiGLU.forward, self, x, tiles, list(self.parameters()))


class UnfusedMHF(FlashMHF):
    """The FlashMHF layer with its `[tokens, H, d_ff]` intermediates in memory: one batched GEMM for each product."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, d_model]` to `[B, L, d_model]`."""
        assert self.w_out is not None
        q = self.queries(x)  # [B, L, H, d_h]
        r = router_weights(q, self.router).to(q.dtype)  # [B, L, H, E]
        k, u, v = (w.flatten(1, 2) for w in (self.k, self.u, self.v))  # [H, d_ff, d_h]
        m = torch.einsum("blhd,hfd->blhf", q, k)
        n = torch.einsum("blhd,hfd->blhf", q, u)
        a = (F.silu(m) * n).unflatten(-1, (self.num_subnetworks, self.d_e)) * r.unsqueeze(-1)  # [B, L, H, E, d_e]
        return self.w_out(torch.einsum("blhf,hfd->blhd", a.flatten(-2), v).flatten(-2))


class FlashMHFOp(nn.Module):
    """The bare op: Q and R come in, no W_in, router or W_out."""

    def __init__(self, num_heads: int, num_subnetworks: int, d_e: int, d_h: int) -> None:
        super().__init__()
        self.k, self.u, self.v = (
            nn.Parameter(torch.randn(num_heads, num_subnetworks, d_e, d_h) / math.sqrt(width))
            for width in (d_h, d_h, d_e)
        )

    def forward(self, q: Tensor, r: Tensor) -> Tensor:
        """Map `[B, L, H, d_h]` to `[B, L, H, d_h]`."""
        return flash_mhf(q, self.k, self.u, self.v, r)


class InBlock(nn.Module):
    """A layer where a Transformer has it: `x + layer(RMSNorm(x))`."""

    def __init__(self, d_model: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, d_model]` to `[B, L, d_model]`."""
        return x + self.layer(self.norm(x))


@dataclass(frozen=True)
class Peer:
    """One line of the table."""

    name: str
    family: str  # swiglu, mhf or op: which inputs and which count of FLOPs
    build: Callable[[Sizes], nn.Module]
    compiled: bool = False
    package: str | None = None  # the import name that it needs
    cuda_only: bool = False

    def unavailable(self, device: torch.device) -> str | None:
        """Return why this peer cannot run here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        return "needs CUDA" if self.cuda_only and device.type != "cuda" else None

    def module(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, in_block: bool = False) -> nn.Module:
        """Build the layer; `torch.compile` is for exactly these sizes, as in training at one context length."""
        with device:  # drawing large weights on the CPU takes seconds
            layer = self.build(sizes)
            module = (InBlock(sizes.d_model, layer) if in_block else layer).to(dtype)
        if self.compiled:
            module.compile(fullgraph=True, dynamic=False)
        return module

    def inputs(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Draw inputs of unit scale that want a gradient: x, or q and r for the bare op."""
        leading = (sizes.batch, sizes.length)
        if self.family != "op":
            return (torch.randn(*leading, sizes.d_model, device=device, dtype=dtype, requires_grad=True),)
        q = torch.randn(*leading, sizes.num_heads, sizes.d_h, device=device, dtype=dtype, requires_grad=True)
        # As router_weights lays it out.
        r = torch.rand(sizes.num_heads, sizes.num_subnetworks, *leading, device=device).permute(2, 3, 0, 1)
        return q, (r / r.sum(-1, keepdim=True)).requires_grad_()

    def d_ff(self, sizes: Sizes) -> int:
        """Width of the intermediate."""
        return sizes.swiglu_d_ff if self.family == "swiglu" else sizes.mhf_d_ff

    def forward_flops(self, sizes: Sizes) -> int:
        """Model FLOPs of the forward: `6 T d_model d_ff`, and `4 T d_model^2` for W_in and W_out."""
        projections = 4 * sizes.tokens * sizes.d_model**2 if self.family == "mhf" else 0
        return 6 * sizes.tokens * sizes.d_model * self.d_ff(sizes) + projections


def _swiglu(kind: type[SwiGLU]) -> Callable[[Sizes], nn.Module]:
    return lambda sizes: kind(sizes.d_model, sizes.swiglu_d_ff)


def _liger(module: str, name: str) -> Callable[[Sizes], nn.Module]:
    def build(sizes: Sizes) -> nn.Module:
        layer: Any = getattr(importlib.import_module(f"liger_kernel.transformers.{module}"), name)
        return layer(SimpleNamespace(hidden_size=sizes.d_model, intermediate_size=sizes.swiglu_d_ff, hidden_act="silu"))

    return build


def _mhf(kind: type[FlashMHF]) -> Callable[[Sizes], nn.Module]:
    return lambda sizes: kind(sizes.d_model, sizes.num_heads, sizes.num_subnetworks, sizes.d_e)


def _recomputing(sizes: Sizes) -> nn.Module:
    return FlashMHF(sizes.d_model, sizes.num_heads, sizes.num_subnetworks, sizes.d_e, recompute_queries=True)


def _op(sizes: Sizes) -> nn.Module:
    return FlashMHFOp(sizes.num_heads, sizes.num_subnetworks, sizes.d_e, sizes.d_h)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("swiglu", "swiglu", _swiglu(SwiGLU)),
        Peer("swiglu_compiled", "swiglu", _swiglu(SwiGLU), compiled=True),
        Peer("swiglu_compiled_checkpoint", "swiglu", _swiglu(CheckpointedSwiGLU), compiled=True),
        Peer("liger_swiglu", "swiglu", _liger("swiglu", "LigerSwiGLUMLP"), package="liger_kernel", cuda_only=True),
        Peer(
            "liger_tiled", "swiglu", _liger("tiled_mlp", "LigerTiledSwiGLUMLP"), package="liger_kernel", cuda_only=True
        ),
        Peer("deepspeed_tiled", "swiglu", _swiglu(DeepSpeedTiledSwiGLU), package="deepspeed"),
        Peer("mhf_unfused", "mhf", _mhf(UnfusedMHF)),
        Peer("flash_mhf", "mhf", _mhf(FlashMHF)),
        Peer("flash_mhf_compiled", "mhf", _mhf(FlashMHF), compiled=True),
        Peer("flash_mhf_compiled_recompute", "mhf", _recomputing, compiled=True),
        Peer("flash_mhf_op", "op", _op),
    )
}
