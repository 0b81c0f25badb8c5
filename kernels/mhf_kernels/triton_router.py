"""The gate on NVIDIA GPUs: Triton kernels and their launches. May import torch, triton and its siblings.

A program owns tiles of tokens of one head, and has all sub-networks, padded to a power of two, in registers. With
`P = Q W`, `s = sigmoid(P)`, `R = s / sum_e s`:

    dP = R (1 - s) (dR - sum_e R dR)      dQ = dP W^T      dW = Q^T dP, summed over tiles in a fixed order

bfloat16 Q multiplies on the tensor cores and loses nothing that counts: a float32 factor is split into two bfloat16
parts, the second of which holds what the first rounds away, so that it enters with 16 bits. Other dtypes multiply in
IEEE float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhf_kernels import triton_backend
from mhf_kernels.launching import cdiv, launch, next_power_of_2
from mhf_kernels.reference import LEAST_SUM

# Tokens of a tile, and the most elements of a padded W: what 99 KiB of shared memory hold. IEEE products are unrolled
# by the compiler, in time and registers that grow with the tile.
BLOCK_M, WIDE_BLOCK_M, IEEE_BLOCK_M = 64, 32, 16
MOST_ELEMENTS, MOST_IEEE_ELEMENTS = 8192, 4096
MOST_TILES = 16  # of tokens, which one program of the backward walks and sums for dW
SMALLEST_SUM = tl.constexpr(LEAST_SUM)


def supports(q: Tensor, router: Tensor) -> bool:
    """Say whether these kernels can run the gate for these inputs here."""
    smallest, largest = triton_backend.D_H
    most = MOST_ELEMENTS if q.dtype == torch.bfloat16 else MOST_IEEE_ELEMENTS
    return (
        (triton_backend.INTERPRETED or triton_backend.device_refusal(q.device) is None)
        and q.dtype in triton_backend.DTYPES
        and router.dtype in triton_backend.DTYPES
        and smallest <= router.shape[1] <= largest
        and math.prod(_padded(router)) <= most
    )


def forward(q: Tensor, router: Tensor) -> Tensor:
    """Return R `[B, L, H, E]` in float32, in memory `[H, E, B, L]`."""
    batch, length, heads, _ = q.shape
    r = torch.empty(heads, router.shape[2], batch, length, dtype=torch.float32, device=q.device).permute(2, 3, 0, 1)
    if r.numel() == 0:
        return r
    constants = _constants(q, router)
    launch(
        _forward_kernel, (cdiv(batch * length, constants["BLOCK_M"]), heads), q.device,
        q, router, r, *q.stride(), *router.stride(), *r.stride(),
        batch * length, length,
        **constants,
    )  # fmt: skip
    return r


def backward(grad_r: Tensor, q: Tensor, router: Tensor, dq: Tensor | None) -> Tensor:
    """Add to the contiguous `dq`, where it is given, and return the gradient of `router`."""
    batch, length, heads, _ = q.shape
    dw = torch.empty(router.shape, dtype=router.dtype, device=q.device)
    if q.numel() == 0:
        return dw.zero_()
    constants = _constants(q, router)
    tiles = cdiv(batch * length, constants["BLOCK_M"])
    # Few enough parts that their sum is cheap, and enough to fill the GPU twice.
    walked = min(MOST_TILES, cdiv(tiles * heads, 2 * triton_backend.multiprocessors(q.device)))
    splits = cdiv(tiles, walked)
    partials = torch.empty((splits, *router.shape), dtype=torch.float32, device=q.device)
    launch(
        _backward_kernel, (splits, heads), q.device,
        grad_r, q, router, dq, partials, *grad_r.stride(), *q.stride(), *router.stride(),
        batch * length, length, heads, walked,
        NEED_Q=dq is not None,
        **constants,
    )  # fmt: skip
    triton_backend.sum_splits(partials, dw)
    return dw


def split(router: Tensor, dtype: torch.dtype, block_e: int) -> Tensor:
    """Return W `[H, d_h, E]` as `[H, 2, block_e, d_h]`: in 16 bits, and what they leave of it; zero in the padding."""
    heads, d_h, subnetworks = router.shape
    halves = torch.empty(heads, 2, block_e, d_h, dtype=dtype, device=router.device)
    launch(
        _split_kernel, (heads,), router.device, router, halves, *router.stride(),
        D=d_h, E=subnetworks, BLOCK_D=next_power_of_2(d_h), BLOCK_E=block_e,
    )  # fmt: skip
    return halves


def _constants(q: Tensor, router: Tensor) -> dict[str, Any]:
    block_d, block_e = _padded(router)
    block_m = IEEE_BLOCK_M if q.dtype != torch.bfloat16 else BLOCK_M if block_d <= 128 else WIDE_BLOCK_M
    return {
        "D": router.shape[1],
        "E": router.shape[2],
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "SPLIT": q.dtype == torch.bfloat16 and not triton_backend.INTERPRETED,
        "num_stages": 2,
    }


def _padded(router: Tensor) -> tuple[int, int]:
    return next_power_of_2(router.shape[1]), max(16, next_power_of_2(router.shape[2]))


@triton.jit
def _product(a, b, SPLIT: tl.constexpr):
    """Multiply float32 tiles; with SPLIT, as sums of bfloat16 products good to 16 bits of each factor."""
    if SPLIT:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a_low, b_low = (a - a_high.to(tl.float32)).to(tl.bfloat16), (b - b_high.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(a_low, b_high)
        product = tl.dot(a_high, b_low, product)
        product = tl.dot(a_high, b_high, product)
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def _product_of_q(q, b, SPLIT: tl.constexpr):
    """The same, where the first factor is bfloat16 already if SPLIT."""
    if SPLIT:
        b_high = b.to(tl.bfloat16)
        product = tl.dot(q, (b - b_high.to(tl.float32)).to(tl.bfloat16))
        product = tl.dot(q, b_high, product)
    else:
        product = tl.dot(q.to(tl.float32), b, input_precision="ieee")
    return product


@triton.jit
def _router_tile(
    w, head, w_h, w_d, w_e, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Load a head's W as float32 `[BLOCK_D, BLOCK_E]`, zero in the padding."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    pointers = w + head.to(tl.int64) * w_h + d[:, None] * w_d + e[None, :] * w_e
    return tl.load(pointers, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _split_kernel(
    w, halves, w_h, w_d, w_e, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Write both halves of a head's W, transposed. Grid `(heads,)`."""
    head = tl.program_id(0)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    tile = _router_tile(w, head, w_h, w_d, w_e, D, E, BLOCK_D, BLOCK_E)
    high = tile.to(halves.dtype.element_ty)
    low = (tile - high.to(tl.float32)).to(halves.dtype.element_ty)
    out = halves + head.to(tl.int64) * (2 * BLOCK_E * D) + e[None, :] * D + d[:, None]
    there = tl.broadcast_to((d < D)[:, None], [BLOCK_D, BLOCK_E])
    tl.store(out, high, mask=there)
    tl.store(out + BLOCK_E * D, low, mask=there)


@triton.jit
def _token_rows(tile, length, head, x_b, x_l, x_h, BLOCK_M: tl.constexpr):
    """Return the offsets `[BLOCK_M]` of a tile of tokens of a head, counted over all sequences."""
    token = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    return token // length * x_b + token % length * x_l + head.to(tl.int64) * x_h


@triton.jit
def _gate(q_tile, w, E: tl.constexpr, BLOCK_E: tl.constexpr, SPLIT: tl.constexpr):
    """Return s, its sum over e before it is clamped, and R, of a tile of tokens; s and R are zero in the padding."""
    p = _product_of_q(q_tile, w, SPLIT)
    s = tl.where((tl.arange(0, BLOCK_E) < E)[None, :], tl.sigmoid(p), 0.0)
    total = tl.sum(s, 1)
    return s, total, s / tl.maximum(total, SMALLEST_SUM)[:, None]


@triton.jit(do_not_specialize=["tokens", "length"])
def _forward_kernel(
    q, w, r,
    q_b, q_l, q_h, q_d,
    w_h, w_d, w_e,
    r_b, r_l, r_h, r_e,
    tokens, length,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Write R of a tile of tokens of one head. Grid `(tiles, heads)`."""
    tile, head = tl.program_id(0), tl.program_id(1)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inside = tile * BLOCK_M + tl.arange(0, BLOCK_M) < tokens
    rows = q + _token_rows(tile, length, head, q_b, q_l, q_h, BLOCK_M)
    q_tile = tl.load(rows[:, None] + d[None, :] * q_d, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    _, _, gate = _gate(q_tile, _router_tile(w, head, w_h, w_d, w_e, D, E, BLOCK_D, BLOCK_E), E, BLOCK_E, SPLIT)
    out = r + _token_rows(tile, length, head, r_b, r_l, r_h, BLOCK_M)
    tl.store(out[:, None] + e[None, :].to(tl.int64) * r_e, gate, mask=inside[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["tokens", "length", "heads", "walked"])
def _backward_kernel(
    grad_r, q, w, dq, partials,
    g_b, g_l, g_h, g_e,
    q_b, q_l, q_h, q_d,
    w_h, w_d, w_e,
    tokens, length, heads, walked,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr,
    NEED_Q: tl.constexpr,
):  # fmt: skip
    """Add to dQ of `walked` tiles of tokens of one head, and write what they add to dW. Grid `(splits, heads)`."""
    split, head = tl.program_id(0), tl.program_id(1)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    w_tile = _router_tile(w, head, w_h, w_d, w_e, D, E, BLOCK_D, BLOCK_E)
    dw = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for tile in range(split * walked, (split + 1) * walked):
        token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < tokens
        rows = q + _token_rows(tile, length, head, q_b, q_l, q_h, BLOCK_M)
        q_tile = tl.load(rows[:, None] + d[None, :] * q_d, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        s, total, gate = _gate(q_tile, w_tile, E, BLOCK_E, SPLIT)
        rows = grad_r + _token_rows(tile, length, head, g_b, g_l, g_h, BLOCK_M)
        wanted = inside[:, None] & (e < E)[None, :]
        grad = tl.load(rows[:, None] + e[None, :].to(tl.int64) * g_e, mask=wanted, other=0.0).to(tl.float32)
        mean = tl.where(total >= SMALLEST_SUM, tl.sum(gate * grad, 1), 0.0)
        dp = gate * (1.0 - s) * (grad - mean[:, None])
        if NEED_Q:
            out = dq + (token.to(tl.int64) * heads + head)[:, None] * D + d[None, :]
            there = inside[:, None] & (d < D)[None, :]
            total_q = tl.load(out, mask=there, other=0.0).to(tl.float32) + _product(dp, tl.trans(w_tile), SPLIT)
            tl.store(out, total_q.to(dq.dtype.element_ty), mask=there)
        dw += _product_of_q(tl.trans(q_tile), dp, SPLIT)
    out = partials + (split.to(tl.int64) * heads + head) * (D * E)
    tl.store(out + d[:, None] * E + e[None, :], dw, mask=(d < D)[:, None] & (e < E)[None, :])
