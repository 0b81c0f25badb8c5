"""The `triton` backend: launches the kernels of `triton_kernels`. May import torch, triton and its siblings.

Runs on NVIDIA GPUs from Ampere on, and, for tests, on the CPU in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mhf_kernels import triton_kernels, tuning
from mhf_kernels.launching import cdiv, launch, next_power_of_2

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

name = "triton"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
D_H = (16, 256)  # smallest and largest; multiples of 16 in between
GATES = ("fast", "exact")
INTERPRETED = triton.knobs.runtime.interpret
DECODE_TOKENS = 64  # up to here the tile of tokens is as small as the tensor cores allow
# With 99 KiB of shared memory, TF32 has no tile for d_h above 128: backward_tokens needs seven operands of 16 KiB each.
NARROW = ("sm_86", "sm_89")
MOST_SPLITS = 8  # of the tokens of dK, dU and dV where their columns alone fill the GPU: bounds the workspace
# What the kernel of dK, dU and dV computes while a byte moves: 402 TFLOP/s by 3.1 TB/s, bfloat16 on an H200. It is less
# in float32, where splits are therefore taken for dearer than they are.
FLOPS_PER_BYTE = 130


class TileWarning(UserWarning):
    """A tile of the tuning table does not fit this GPU, and the default runs in its place."""


def supports(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None) -> str | None:
    """Return None where these inputs can run here, else the reason why not."""
    refusal = None if INTERPRETED else device_refusal(q.device)
    if refusal is not None:
        return refusal
    if q.dtype not in DTYPES:
        return f"the triton kernels run bfloat16, float16 and float32, not {q.dtype}"
    d_h, d_e = k.shape[3], k.shape[2]
    if not D_H[0] <= d_h <= D_H[1] or d_h % 16:
        return f"the triton kernels need d_h to be a multiple of 16 from {D_H[0]} to {D_H[1]}; it is {d_h}"
    if d_e % 16:
        return f"the triton kernels need d_e to be a multiple of 16; it is {d_e}"
    return None


@functools.cache
def device_refusal(device: torch.device) -> str | None:
    """Return None where Triton's kernels run on this device, else the reason why not."""
    if device.type != "cuda":
        return f"the triton kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip is not None:
        return "the triton kernels run on NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the triton kernels need compute capability 8.0 (Ampere); this GPU has {arch(device)}"
    return None


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Compute step 4 of the layer; shapes and dtypes as in `mhf_kernels.flash_mhf`."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    q_seq, r_seq = _sequences(q, r)
    if _is_decoding(q_seq):
        _with_tile("decode", q, lambda tile: _forward(q_seq, k, u, v, r_seq, o, decode_tile(tile, q_seq)))
    else:
        _with_tile("forward", q, lambda tile: _forward(q_seq, k, u, v, r_seq, o, tile))
    return o


def _is_decoding(q: Tensor) -> bool:
    """Say whether there are few tokens, and too few tiles of them to fill the GPU."""
    batch, length, heads, _ = q.shape
    tile, _ = tuning.lookup(*_row("forward", q))
    programs = batch * heads * cdiv(length, tile.block_m)
    return length <= DECODE_TOKENS and programs < tile.programs_per_sm * multiprocessors(q.device)


def decode_tile(tile: tuning.Tile, q: Tensor) -> tuning.Tile:
    """Let one tile hold all tokens, so that K, U and V are read once; not in float32.

    There, 64 tokens of d_h 256 need 112 KiB of shared memory even with the default tile, more than many GPUs have, and
    minutes to compile with the tile tuned for Hopper.
    """
    if q.dtype == torch.float32:
        return tile
    return replace(tile, block_m=min(DECODE_TOKENS, max(tile.block_m, next_power_of_2(q.shape[1]))))


def _forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor, o: Tensor, tile: tuning.Tile) -> None:
    batch, length, heads, _ = q.shape
    kuv_heads, subnetworks, d_e, _ = k.shape
    tiles_m = cdiv(length, tile.block_m)
    # Too few tiles of tokens to fill the GPU: several programs share one, each with a part of d_ff.
    programs, slots = batch * heads * tiles_m, tile.programs_per_sm * multiprocessors(q.device)
    tiles = subnetworks * cdiv(d_e, tile.block_n)
    tiles_per_split = min(tiles, cdiv(tiles * programs, slots))
    splits = cdiv(tiles, tiles_per_split)
    out = o if splits == 1 else torch.empty((splits, *o.shape), dtype=torch.float32, device=q.device)

    constants = _constants(q, tile, d_e)
    described = _described((q,), (k, u, v), tile, constants)
    launch(
        triton_kernels.forward_kernel, (programs, splits), q.device,
        *described, r, out,
        *q.stride(), *k.stride(), *u.stride(), *v.stride(), *r.stride(),
        length, heads, heads // kuv_heads, subnetworks, d_e,
        tiles_per_split, tiles_m, batch * length,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(out, o)


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    needs_grad: tuple[bool, bool, bool, bool, bool],
) -> Grads:
    """Compute the gradients of `forward` from its inputs alone: one kernel for q and r, one for k, u and v.

    Shapes, dtypes and strides of the gradients as in `dispatch.Backend`.
    """
    need_q, need_k, need_u, need_v, need_r = needs_grad
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_q else None
    dr = torch.empty_like(r) if need_r else None
    dk, du, dv = (
        torch.empty(w.shape, dtype=w.dtype, device=w.device) if needed else None
        for w, needed in ((k, need_k), (u, need_u), (v, need_v))
    )
    if q.numel() == 0:
        for total in (dk, du, dv):
            if total is not None:
                total.zero_()
        return dq, dk, du, dv, dr
    grad_seq, q_seq, r_seq, *dr_seq = _sequences(grad_o, q, r, *(() if dr is None else (dr,)))
    if need_q or need_r:
        gates = (r_seq, dr_seq[0] if dr_seq else None)
        _with_tile("backward_tokens", q, lambda tile: _backward_tokens(grad_seq, q_seq, k, u, v, *gates, dq, tile))
    if need_k or need_u or need_v:
        sums = (dk, du, dv)
        _with_tile("backward_weights", q, lambda tile: _backward_weights(grad_seq, q_seq, k, u, v, r_seq, *sums, tile))
    return dq, dk, du, dv, dr


def _backward_tokens(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    dr: Tensor | None,
    dq: Tensor | None,
    tile: tuning.Tile,
) -> None:
    batch, length, heads, _ = q.shape
    kuv_heads, subnetworks, d_e, _ = k.shape
    constants = _constants(q, tile, d_e)
    tiles_m = cdiv(length, tile.block_m)
    dr_strides = (0, 0, 0, 0) if dr is None else dr.stride()
    launch(
        triton_kernels.backward_tokens_kernel, (batch * tiles_m * heads,), q.device,
        grad_o, q, *_described((), (k, u, v), tile, constants), r, dq, dr,
        *grad_o.stride(), *q.stride(), *k.stride(), *u.stride(), *v.stride(), *r.stride(), *dr_strides,
        length, heads, heads // kuv_heads, subnetworks, d_e, tiles_m,
        NEED_Q=dq is not None, NEED_R=dr is not None,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _backward_weights(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    dk: Tensor | None,
    du: Tensor | None,
    dv: Tensor | None,
    tile: tuning.Tile,
) -> None:
    batch, length, heads, _ = q.shape
    kuv_heads, subnetworks, d_e, _ = k.shape
    constants = _constants(q, tile, d_e)
    tiles_m = cdiv(length, tile.block_m)
    sequences = batch * (heads // kuv_heads)
    programs = kuv_heads * subnetworks * constants["TILES_E"]
    slots = tile.programs_per_sm * multiprocessors(q.device)
    splits = weight_splits(programs, slots, sequences * tiles_m, tile.block_m)
    tiles_per_split = cdiv(sequences * tiles_m, splits)
    outs = [
        x if x is None or splits == 1 else torch.empty((splits, *x.shape), dtype=torch.float32, device=x.device)
        for x in (dk, du, dv)
    ]
    launch(
        triton_kernels.backward_weights_kernel, (programs, splits), q.device,
        grad_o, q, *_described((), (k, u, v), tile, constants), r, *outs,
        *grad_o.stride(), *q.stride(), *k.stride(), *u.stride(), *v.stride(), *r.stride(),
        batch, length, heads // kuv_heads, subnetworks, d_e,
        tiles_m, sequences, tiles_per_split, kuv_heads * subnetworks * d_e,
        NEED_K=dk is not None, NEED_U=du is not None, NEED_V=dv is not None, TRANSPOSED=tile.transposed,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        for partials, total in zip(outs, (dk, du, dv), strict=True):
            if partials is not None and total is not None:
                sum_splits(partials, total)


def weight_splits(programs: int, slots: int, tiles: int, block_m: int) -> int:
    """Return into how many parts to cut the tokens of dK, dU and dV, so that the parts and their sum are done soonest.

    The unit of the model is the time of one tile in one slot. `programs * splits` programs run in waves of `slots`, and
    each walks `ceil(tiles / splits)` tiles. With several parts, each program also leaves `3 block_n d_h` float32 sums,
    written once and read once: 24 bytes for each of `block_n d_h`, at the bandwidth of the whole GPU. A tile is six
    products, `12 block_m` FLOPs for each of `block_n d_h`, at a slot's share of the GPU's speed. So the sums of a
    program cost `2 FLOPS_PER_BYTE / (block_m slots)`: a part costs `2 FLOPS_PER_BYTE / tokens` of the whole kernel.

    Until they are summed, the parts take 4 bytes for each element of dK, dU and dV, `splits` times.

    Args:
        programs: that the columns of d_ff make.
        slots: programs that run at a time.
        tiles: of tokens.
        block_m: tokens of a tile.
    """

    def cost(splits: int) -> float:
        walked = cdiv(programs * splits, slots) * cdiv(tiles, splits)
        return walked if splits == 1 else walked + programs * splits * 2 * FLOPS_PER_BYTE / (block_m * slots)

    return min(range(1, max(MOST_SPLITS, slots // programs) + 1), key=cost)


def sum_splits(partials: Tensor, out: Tensor) -> None:
    """Write float32 `partials [splits, ...]`, summed over splits in a fixed order, to the contiguous `out [...]`."""
    splits = partials.shape[0]
    rows = next_power_of_2(splits)
    block = max(32, 4096 // rows)
    grid = (cdiv(out.numel(), block),)
    launch(
        triton_kernels.sum_splits_kernel, grid, out.device, partials, out, out.numel(), splits, SPLITS=rows, BLOCK=block
    )


def _sequences(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View `[B, L, ...]` as one sequence `[1, B * L, ...]` where the strides of all tensors allow it."""
    if all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) or x.shape[1] == 1 for x in tensors):
        return tuple(
            x.as_strided(
                (1, x.shape[0] * x.shape[1], *x.shape[2:]),
                (0, x.stride(0) if x.shape[1] == 1 else x.stride(1), *x.stride()[2:]),
            )
            for x in tensors
        )
    return tensors


def _described(
    tokens: tuple[Tensor, ...], weights: tuple[Tensor, ...], tile: tuning.Tile, constants: dict[str, Any]
) -> list[Any]:
    """Turn tensors into TMA descriptors where all of them can be, and say so in `constants`."""
    tensors = (*tokens, *weights)
    constants["DESCRIPTORS"] = all(_can_describe(x) for x in tensors)
    if not constants["DESCRIPTORS"]:
        return list(tensors)
    block_d = constants["BLOCK_D"]
    token_block, weight_block = [1, tile.block_m, 1, block_d], [1, 1, tile.block_n, block_d]
    blocks = [token_block] * len(tokens) + [weight_block] * len(weights)
    return [
        TensorDescriptor(x, list(x.shape), _described_strides(x), block)
        for x, block in zip(tensors, blocks, strict=True)
    ]


def _described_strides(x: Tensor) -> list[int]:
    """Return the strides, with those of dimensions of size 1, which nobody follows, made acceptable to TMA."""
    unit = 16 // x.element_size()
    strides = [unit if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return [*strides, 1]


def _can_describe(x: Tensor) -> bool:
    """Say whether TMA can read `x`: 16-byte aligned, last dimension dense, other strides multiples of 16 bytes."""
    unit = 16 // x.element_size()
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % unit == 0 and stride * x.element_size() < 2**40 for stride in strides)
    )


def _constants(q: Tensor, tile: tuning.Tile, d_e: int) -> dict[str, Any]:
    d_h = q.shape[-1]
    tf32 = not INTERPRETED and _tf32(q.dtype, d_h, arch(q.device))
    return {
        "D": d_h,
        "TILES_E": cdiv(d_e, tile.block_n),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": next_power_of_2(d_h),
        "GATE": _gate(q.dtype, tf32),
        "INTERPRETED": INTERPRETED,  # the interpreter multiplies the bits of bfloat16 tiles
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def _tf32(dtype: torch.dtype, d_h: int, arch: str) -> bool:
    """Say whether products are to be in TF32: where PyTorch's setting for matrix products allows it, and it fits."""
    if dtype != torch.float32 or (d_h > 128 and arch in NARROW):
        return False
    # What cuBLAS goes by; unlike torch.get_float32_matmul_precision, it can be read whichever API has set it.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _gate(dtype: torch.dtype, tf32: bool) -> str:
    if INTERPRETED:  # has neither inline assembly nor libm
        return "exp"
    if dtype == torch.float32:
        return "exp" if tf32 else "libm"
    return "exp" if gate() == "exact" else "tanh"


def gate() -> str:
    """Return how 16-bit inputs compute SiLU, from the environment variable `MHF_GATE`: `fast` (default) or `exact`.

    Raises:
        ValueError: it has another value.
    """
    chosen = os.environ.get("MHF_GATE") or "fast"
    if chosen not in GATES:
        raise ValueError(f"MHF_GATE={chosen} is unknown; allowed: {', '.join(GATES)}")
    return chosen


def _with_tile(kernel: str, q: Tensor, run: Callable[[tuning.Tile], None]) -> None:
    """Call `run` with the tile of a kernel.

    If a tile of the table exceeds this GPU, its row is forgotten in this process, and the default runs from now on.
    """
    row = _row(kernel, q)
    tile, source = tuning.lookup(*row)
    try:
        run(tile)
        return
    except triton.OutOfResources as error:
        if source == "default":
            raise
        warnings.warn(
            f"the tile tuned for {tuning.key(*row)} does not fit this GPU, and the default runs instead ({error}); "
            "`python -m mhf_kernels.tune` measures tiles that fit",
            TileWarning,
            stacklevel=2,
        )
    tuning.forget(tuning.key(*row))
    run(tuning.lookup(*row)[0])


def _row(kernel: str, q: Tensor) -> tuple[str, str, int, str]:
    """Return what names a row of the tuning table."""
    dtype = "float32" if q.dtype == torch.float32 else "half"
    return kernel, arch(q.device), next_power_of_2(q.shape[-1]), dtype


@functools.cache
def arch(device: torch.device) -> str:
    """Return the architecture as the tuning table names it: `sm_90`, or `interpreter` without a GPU."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs can run at a time, one on each multiprocessor; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
