"""A decoder on several devices: tensor parallelism over heads, and FSDP2 per block. Plain torch, no Lightning.

Tensor parallelism splits each block twice, attention and feed-forward layer alike: the first projections by column
(so every rank holds whole heads), everything between by head, the last projection by row. That costs one all-reduce of
``[B, L, d_model]`` for each of the two in the forward, and one in the backward. Layers without heads are split by
column or sub-network; ``gated_swiglu`` and ``dense_moe``, which normalise their gates over all sub-networks, cost one
more in the forward and two in the backward. Embedding, head and norms are whole on every rank and computed alike.
FlashMHF's op takes DTensors by the sharding that ``mhf_kernels`` registers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from mhf_lightning.model.config import DecoderConfig
from mhf_lightning.model.transformer import Block, Decoder

# DTensor knows the attention kernels of GPUs, and of the CPU's only the forward; pkv calls it on DTensors.


@register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention_ways(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> list[tuple[list[Any], list[Any]]]:
    """Split by batch or heads, or not: (output, logsumexp), (q, k, v, dropout_p, is_causal)."""
    return [([way] * 2, [way] * 3 + [None] * 2) for way in (Replicate(), Shard(0), Shard(1))]


@register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _attention_backward_ways(grad: Any, *_: Any, **__: Any) -> list[tuple[list[Any], list[Any]]]:
    """Split alike: gradients of q, k, v, and (grad, q, k, v, output, logsumexp, dropout_p, is_causal)."""
    return [([way] * 3, [way] * 6 + [None] * 2) for way in (Replicate(), Shard(0), Shard(1))]


class Split(NamedTuple):
    """How a feed-forward variant is split: the configured sizes to divide, and a dimension for each parameter."""

    sizes: tuple[str, ...]
    dimensions: dict[str, int]


_HEADS = ("num_heads", "num_kuv_heads")
_BY_HEAD = {"w_in.weight": 0, "q_norm.weight": 0, "router": 0, "k": 0, "u": 0, "v": 0, "w_out.weight": 1}
_BY_COLUMN = {"gate.weight": 0, "up.weight": 0, "down.weight": 1}
FFN_SPLITS: dict[str, Split] = {
    "swiglu": Split(("d_ff",), _BY_COLUMN),
    "gated_swiglu": Split(("num_subnetworks",), {**_BY_COLUMN, "router": 2}),
    "mh_ffn": Split(_HEADS, _BY_HEAD),
    "pkv": Split(_HEADS, _BY_HEAD),
    "dense_moe": Split(("num_subnetworks",), {"k": 0, "u": 0, "v": 0, "router": 2}),  # W_in and W_out stay whole
    "flash_mhf": Split(_HEADS, _BY_HEAD),
}


def check_tensor_parallel(config: DecoderConfig, size: int) -> None:
    """Check that a decoder can be split over ``size`` tensor-parallel ranks.

    Raises:
        ValueError: The feed-forward variant has no split, or what is split is not a multiple of ``size``.
    """
    if config.ffn.name not in FFN_SPLITS:
        raise ValueError(
            f"tensor parallelism supports the feed-forward layers {', '.join(FFN_SPLITS)}, not {config.ffn.name!r}; "
            f"set tensor_parallel_size to 1"
        )
    sizes = {"num_attention_heads": config.num_attention_heads, "num_kv_heads": config.num_kv_heads}
    sizes |= {f"ffn.{key}": getattr(config.ffn, key) for key in FFN_SPLITS[config.ffn.name].sizes}
    uneven = [f"{key} {value}" for key, value in sizes.items() if value is not None and value % size]
    if uneven:
        raise ValueError(f"tensor_parallel_size is {size}; it must divide {' and '.join(uneven)}")


def split_heads(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Apply tensor parallelism over the one-dimensional ``mesh`` in place; nothing where it holds one rank.

    Raises:
        ValueError: As :func:`check_tensor_parallel`.
    """
    if mesh.size() == 1:
        return
    check_tensor_parallel(decoder.config, mesh.size())
    for block in decoder.blocks:
        assert isinstance(block, Block)
        _split_attention(block.attention, mesh)
        _split_ffn(block.ffn, mesh, FFN_SPLITS[decoder.config.ffn.name].dimensions)


def _split_attention(attention: nn.Module, mesh: DeviceMesh) -> None:
    """Between the projections each rank runs on plain tensors: its own heads."""
    whole = (Replicate(), None, None, None)  # x; cos, sin and mask stay plain tensors
    style = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(attention, mesh, {**style, "o_proj": RowwiseParallel()})
    parallelize_module(attention, mesh, PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole))


def _split_ffn(ffn: nn.Module, mesh: DeviceMesh, dimensions: dict[str, int]) -> None:
    """Turn all parameters into DTensors, split or whole, and the input too: every operation inside finds its part."""

    def split(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            dim = dimensions.get(f"{name}.{key}" if name else key)
            if dim is not None:
                module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(dim)])))

    def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
        return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

    def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        return output.redistribute(placements=[Replicate()]).to_local()

    distribute_module(ffn, mesh, split, cast(Any, enter), cast(Any, leave))  # typed as if they returned nothing


def shard(decoder: Decoder, mesh: DeviceMesh, param_dtype: torch.dtype | None = None) -> None:
    """Apply FSDP2 over the one-dimensional ``mesh`` in place, block by block; gradients are reduced in float32.

    Every parameter becomes a DTensor. Call it after :func:`split_heads` and after compiling the blocks.

    Args:
        decoder: The model.
        mesh: Data-parallel ranks.
        param_dtype: Dtype in which weights are gathered and used; None keeps that of the parameters.
    """
    # Activations keep their dtype: the rotary tables are float32 inputs of a block.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "shard_placement_fn": partial(_even_dimension, size=mesh.size()),
    }
    for block in decoder.blocks:
        fully_shard(block, **options)
    fully_shard(decoder, **options)


def _even_dimension(parameter: Tensor, size: int) -> Shard:
    """Return the first dimension that ``size`` divides: few heads on many ranks would leave ranks without weights."""
    local, taken = parameter, None
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        taken = next((placement.dim for placement in parameter.placements if isinstance(placement, Shard)), None)
    if local.shape[0] % size == 0:
        return Shard(0)
    return Shard(next((dim for dim, n in enumerate(local.shape) if n % size == 0 and dim != taken), 0))


@torch.no_grad()
def broadcast_weights(decoder: Decoder, device: torch.device) -> None:
    """Give every process the weights of rank 0, as DDP does, one parameter at a time on ``device``."""
    for parameter in decoder.parameters():
        weight = parameter.data.to(device)
        dist.broadcast(weight, src=0)
        parameter.data.copy_(weight)
