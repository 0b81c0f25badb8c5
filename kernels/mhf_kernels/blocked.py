"""The `reference` backend: the op in PyTorch, walking tokens and d_ff in blocks. May import torch and nothing else.

Never holds a `[tokens, heads, d_ff]` tensor: no intermediate over d_ff has more than `BLOCK_ELEMENTS` elements (or
one token's `heads * BLOCK_FF`, where that is more). Everything else is as large as an input. Backward recomputes.

Shapes inside this file: a chunk of C tokens is laid out `[H_kuv, rows, n]` with `rows = (H / H_kuv) * C`. The query
heads of one K/U/V head differ only in their rows, so the sum over a group's heads falls out of the GEMMs.

Precision: GEMMs run in the dtype of the inputs (as a GEMM library does them: wider sums inside, one rounding), every
elementwise step and every sum over blocks in `promote_types(dtype, float32)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

name = "reference"

# Columns of d_ff in a block: the d_e of the paper's released configs, so that one of their sub-networks is one block.
# Narrower blocks mean more passes over the accumulator of Q's size; wider ones fewer tokens in BLOCK_ELEMENTS.
BLOCK_FF = 256

# Elements of one intermediate over d_ff. CPU: 2^20 (4 MiB in float32) keeps a block's handful of intermediates in the
# last-level cache; 2^19 to 2^21 time alike, 2^16 is 1.5-3x slower (per-op overhead), 2^26 1.2-2x (memory traffic).
# Elsewhere: 2^24 (64 MiB), rows enough for a GEMM to fill a GPU and few enough launches.
BLOCK_ELEMENTS = {"cpu": 2**20}
BLOCK_ELEMENTS_ELSEWHERE = 2**24


def supports(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None) -> str | None:
    """Return None: every input that `flash_mhf` accepts runs here."""
    return None


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Compute step 4 of the layer; shapes and dtypes as in `mhf_kernels.flash_mhf`.

    Args:
        q: queries, `[B, L, H, d_h]`.
        k: gate weights, `[H_kuv, E, d_e, d_h]`.
        u: up weights, the shape of `k`.
        v: down weights, the shape of `k`.
        r: gate of each sub-network, `[B, L, H, E]`.

    Returns:
        `[B, L, H, d_h]`, contiguous, in the dtype of `q`.
    """
    kuv_heads = k.shape[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    q_tokens, r_tokens, o_tokens = q.flatten(0, 1), r.flatten(0, 1), o.flatten(0, 1)  # [T, H, n]

    for tokens in _token_chunks(q_tokens, k):
        q_rows = _to_rows(q_tokens[tokens], kuv_heads)
        r_rows = _to_rows(r_tokens[tokens], kuv_heads).to(wide)
        o_rows = torch.zeros_like(q_rows, dtype=wide)
        for e, cols in _ff_blocks(k):
            a = F.silu(torch.bmm(q_rows, k[:, e, cols].mT).to(wide), inplace=True)
            a.mul_(torch.bmm(q_rows, u[:, e, cols].mT))
            a.mul_(r_rows[:, :, e, None])
            _add_bmm(o_rows, a.to(q.dtype), v[:, e, cols])
        _from_rows(o_rows, o_tokens[tokens])
    return o


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    needs_grad: tuple[bool, bool, bool, bool, bool],
) -> Grads:
    """Compute the gradients of `forward` from its inputs alone.

    With `M = Q K^T`, `N = Q U^T`, `G = SiLU(M)` and `D = dO V^T`, per sub-network: `dV = (R G N)^T dO`,
    `dR = sum_n D G N`, `dN = R D G`, `dM = R D N SiLU'(M)`, `dQ = dM K + dN U`, `dK = dM^T Q`, `dU = dN^T Q`.

    Args:
        grad_o: gradient of the output, `[B, L, H, d_h]`.
        q: queries, `[B, L, H, d_h]`.
        k: gate weights, `[H_kuv, E, d_e, d_h]`.
        u: up weights, the shape of `k`.
        v: down weights, the shape of `k`.
        r: gate of each sub-network, `[B, L, H, E]`.
        needs_grad: which of q, k, u, v, r want a gradient; work that only the others need is skipped.

    Returns:
        Gradients of q, k, u, v, r, each in its input's shape and dtype, or None where not wanted; contiguous, but for
        that of r, which is laid out as `torch.empty_like(r)`.
    """
    need_q, need_k, need_u, need_v, need_r = needs_grad
    need_m, need_n = need_q or need_k, need_q or need_u
    need_d = need_m or need_n or need_r
    kuv_heads = k.shape[0]
    wide = torch.promote_types(q.dtype, torch.float32)

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_q else None
    dr = torch.empty(r.shape, dtype=r.dtype, device=r.device) if need_r else None
    dk, du, dv = (  # sums over the token chunks
        torch.zeros(w.shape, dtype=wide, device=w.device) if needed else None
        for w, needed in ((k, need_k), (u, need_u), (v, need_v))
    )
    q_tokens, r_tokens, grad_tokens = q.flatten(0, 1), r.flatten(0, 1), grad_o.flatten(0, 1)  # [T, H, n]

    for tokens in _token_chunks(q_tokens, k):
        q_rows, grad_rows = _to_rows(q_tokens[tokens], kuv_heads), _to_rows(grad_tokens[tokens], kuv_heads)
        r_rows = _to_rows(r_tokens[tokens], kuv_heads).to(wide)
        dq_rows = torch.zeros_like(q_rows, dtype=wide) if need_q else None
        dr_rows = torch.zeros_like(r_rows)
        for e, cols in _ff_blocks(k):
            k_block, u_block, v_block = k[:, e, cols], u[:, e, cols], v[:, e, cols]
            r_e = r_rows[:, :, e, None]
            m = torch.bmm(q_rows, k_block.mT).to(wide)
            n = torch.bmm(q_rows, u_block.mT).to(wide)
            g = F.silu(m)
            if dv is not None:
                _add_bmm(dv[:, e, cols], (g * n).mul_(r_e).to(q.dtype).mT, grad_rows)
            if not need_d:
                continue
            d = torch.bmm(grad_rows, v_block.mT).to(wide)
            if need_r:
                dr_rows[:, :, e] += (d * g).mul_(n).sum(-1)
            d.mul_(r_e)
            if need_n:
                dn = g.mul_(d).to(q.dtype)
                _add_bmm(dq_rows, dn, u_block)
                _add_bmm(None if du is None else du[:, e, cols], dn.mT, q_rows)
            if need_m:
                dm = torch.ops.aten.silu_backward(d.mul_(n), m).to(q.dtype)
                _add_bmm(dq_rows, dm, k_block)
                _add_bmm(None if dk is None else dk[:, e, cols], dm.mT, q_rows)
        if dq is not None and dq_rows is not None:
            _from_rows(dq_rows, dq.flatten(0, 1)[tokens])
        if dr is not None:
            _from_rows(dr_rows, dr.flatten(0, 1)[tokens])

    if dr is not None and not r.is_contiguous():
        dr = torch.empty_like(r).copy_(dr)
    return (
        dq,
        None if dk is None else dk.to(k.dtype),
        None if du is None else du.to(u.dtype),
        None if dv is None else dv.to(v.dtype),
        dr,
    )


def _token_chunks(q_tokens: Tensor, k: Tensor) -> Iterator[slice]:
    tokens, heads, _ = q_tokens.shape
    elements = BLOCK_ELEMENTS.get(q_tokens.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // (heads * min(BLOCK_FF, k.shape[2])))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _ff_blocks(k: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield `(e, slice of d_e)`; the blocks of a sub-network are of nearly equal width (d_e 384 is 2 x 192)."""
    _, subnetworks, d_e, _ = k.shape
    step = -(-d_e // -(-d_e // BLOCK_FF))
    for e in range(subnetworks):
        for start in range(0, d_e, step):
            yield e, slice(start, min(start + step, d_e))


def _to_rows(x: Tensor, kuv_heads: int) -> Tensor:
    """Turn `[C, H, n]` into `[H_kuv, (H / H_kuv) * C, n]`, contiguous: each chunk is read by many GEMMs."""
    chunk, heads, n = x.shape
    grouped = x.unflatten(1, (kuv_heads, heads // kuv_heads)).permute(1, 2, 0, 3)
    return grouped.contiguous().view(kuv_heads, heads // kuv_heads * chunk, n)


def _from_rows(rows: Tensor, out: Tensor) -> None:
    """Write `[H_kuv, (H / H_kuv) * C, n]` into `[C, H, n]`: the inverse of `_to_rows`, with a cast."""
    chunk, heads, n = out.shape
    kuv_heads = rows.shape[0]
    grouped = rows.view(kuv_heads, heads // kuv_heads, chunk, n).permute(2, 0, 1, 3)
    out.unflatten(1, (kuv_heads, heads // kuv_heads)).copy_(grouped)


def _add_bmm(total: Tensor | None, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `total`, which may be of a wider dtype than the GEMM; None is a sum that nobody needs."""
    if total is None:
        return
    if total.dtype == b.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))
