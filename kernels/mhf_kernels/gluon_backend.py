"""The `gluon` backend: launches the warp-specialised Gluon kernels. May import torch, triton and its siblings.

Inputs that these kernels do not take go to the `triton` backend: `supports` says which, and parts of a backward go
there one by one. So does everything, with one warning, once a kernel fails to compile: Gluon changes between versions
of Triton.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mhf_kernels import gluon_kernels, gluon_weights, triton_backend, triton_router
from mhf_kernels.launching import cdiv, launch
from mhf_kernels.triton_backend import Grads, multiprocessors

T = TypeVar("T")

name = "gluon"

DTYPES = (torch.bfloat16, torch.float16)
ROWS = 64  # of a warpgroup
TOKENS = 2 * ROWS  # of a program
SWIZZLED = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@dataclass(frozen=True)
class Rings:
    """Tiles of d_ff, and how many of them a program holds.

    Attributes:
        block_n: columns of d_ff in a tile.
        ku: buffers for tiles of K and U.
        v: buffers for tiles of V.
    """

    block_n: int
    ku: int
    v: int


@dataclass(frozen=True)
class TokenRings:
    """Tiles of tokens that dK, dU and dV walk, and how many of them a program holds.

    Attributes:
        tokens: of a tile that a warpgroup computes the scores of: half of it.
        columns: of d_h whose sums a warpgroup owns.
        q: buffers for tiles of Q and r.
        grad_o: buffers for tiles of dO.
        together: which of dK, dU, dV one launch computes.
    """

    tokens: int
    columns: int
    q: int
    grad_o: int
    together: tuple[tuple[bool, bool, bool], ...] = ((True, True, True),)


# By d_h: what fits into the 227 KiB of a multiprocessor and, but for a few spills of dK and dU, into 240 registers a
# thread.
FORWARD = {64: Rings(128, 3, 3), 128: Rings(64, 3, 3), 256: Rings(32, 3, 3)}
BACKWARD_TOKENS = {64: Rings(64, 3, 3), 128: Rings(64, 3, 2), 256: Rings(32, 2, 2)}
BACKWARD_WEIGHTS = {
    64: TokenRings(64, 64, 4, 4),
    128: TokenRings(64, 64, 2, 2),
    256: TokenRings(32, 128, 2, 1, ((True, True, False), (False, False, True))),
}
MOST_SPLITS = 8  # of the tokens of dK, dU and dV: bounds the workspace
ROUTED_D_H = (64, 128)  # at 256 there is no shared memory left for the router and the gate
BLOCK_E = 32  # sub-networks that a forward with the router has room for

_failure: list[str] = []  # why the kernels cannot be compiled here, once one could not


def supports(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None) -> str | None:
    """Return None where these inputs can run here, else the reason why not."""
    return _device_refusal(q) or _layout_refusal(q, k, u, v, r)


def _device_refusal(q: Tensor) -> str | None:
    if q.device.type != "cuda" or torch.version.hip is not None or triton_backend.arch(q.device) != "sm_90":
        return (
            f"the gluon kernels run on Hopper GPUs (CUDA, compute capability 9.0), not on this {q.device.type} device"
        )
    if q.dtype not in DTYPES:
        return f"the gluon kernels run bfloat16 and float16, not {q.dtype}"
    return _failure[0] if _failure else None


def _layout_refusal(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None) -> str | None:
    d_e, d_h = k.shape[2:]
    tokens = q.shape[0] * q.shape[1]
    programs = cdiv(tokens, TOKENS) * q.shape[2] * k.shape[1]  # that can be had: a tile, a head, a sub-network
    if d_h not in FORWARD:
        reason = f"need d_h to be one of {', '.join(map(str, FORWARD))}; it is {d_h}"
    elif d_e % ROWS:
        reason = f"need d_e to be a multiple of {ROWS}; it is {d_e}"
    elif not all(w.is_contiguous() and w.data_ptr() % 16 == 0 for w in (k, u, v)):
        reason = "need k, u and v to be contiguous"
    elif not _is_matrix(q) or (r is not None and not _is_sequence(r)):
        reason = "need q [B, L, H, d_h] to have its heads behind one another, and q and r one distance between tokens"
    elif tokens <= TOKENS:
        reason = f"need more than {TOKENS} tokens, and there are {tokens}"
    elif programs < multiprocessors(q.device):
        reason = (
            f"need tiles of {TOKENS} tokens, heads and sub-networks for each multiprocessor; {programs} are too few"
        )
    else:
        return None
    return f"the gluon kernels {reason}"


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Compute step 4 of the layer; shapes and dtypes as in `mhf_kernels.flash_mhf`."""
    return _or_triton(lambda: _forward(q, k, u, v, r), lambda: triton_backend.forward(q, k, u, v, r))


def routed_forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, router: Tensor) -> Tensor | None:
    """Do the same with the router's weight in place of r, which then reaches no memory; None where that cannot be.

    As `forward`, it takes inputs that `supports` accepts.
    """
    if q.shape[3] not in ROUTED_D_H or k.shape[1] > BLOCK_E:
        return None
    return _or_triton(lambda: _forward(q, k, u, v, None, router), lambda: None)


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    needs_grad: tuple[bool, bool, bool, bool, bool],
) -> Grads:
    """Compute the gradients of `forward` from its inputs alone; as in `dispatch.Backend`."""
    need_q, need_k, need_u, need_v, need_r = needs_grad
    need_weights = need_k, need_u, need_v

    def portable(needed: tuple[bool, bool, bool, bool, bool]) -> Grads:
        return triton_backend.backward(grad_o, q, k, u, v, r, needed)

    if not _is_matrix(grad_o):
        return portable(needs_grad)
    d_h = q.shape[3]
    dq = dr = dk = du = dv = None
    if need_q or need_r:
        dq, dr = _or_triton(
            lambda: _backward_tokens(grad_o, q, k, u, v, r),
            lambda: portable((need_q, False, False, False, need_r))[::4],
            wanted=d_h in BACKWARD_TOKENS,
        )
    if any(need_weights):
        dk, du, dv = _or_triton(
            lambda: _backward_weights(grad_o, q, k, u, v, r, need_weights),
            lambda: portable((False, *need_weights, False))[1:4],
            wanted=d_h in BACKWARD_WEIGHTS,
        )
    return dq if need_q else None, dk, du, dv, dr if need_r else None


def _forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None, router: Tensor | None = None) -> Tensor:
    """Take the gate from r, or compute it from the router's weight."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    r_seq = None if r is None else _sequence(r)
    halves = None if router is None else _rows(triton_router.split(router, q.dtype, BLOCK_E), BLOCK_E)
    rings = _fitting(FORWARD[q.shape[3]], k.shape[2])
    inputs = _tokens(q), *(_rows(w, rings.block_n) for w in (k, u, v)), r_seq, halves, _tokens(o)
    strides = (0, 0, 0) if r_seq is None else r_seq.stride()[1:]
    _launch_over_tokens(
        gluon_kernels.forward_kernel, rings, k, o, inputs, strides, E=0 if router is None else k.shape[1]
    )
    return o


def _backward_tokens(grad_o: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dr = torch.empty_like(r)
    r_seq, dr_seq = _sequence(r), _sequence(dr)
    rings = BACKWARD_TOKENS[q.shape[3]]
    inputs = _tokens(q), _tokens(grad_o), *(_rows(w, rings.block_n) for w in (k, u, v)), r_seq, _tokens(dq), dr_seq
    strides = *r_seq.stride()[1:], *dr_seq.stride()[1:]
    _launch_over_tokens(gluon_kernels.backward_tokens_kernel, rings, k, dq, inputs, strides)
    return dq, dr


def _launch_over_tokens(
    kernel: Any, rings: Rings, k: Tensor, out: Tensor, inputs: tuple[Any, ...], strides: tuple[int, ...], **more: int
) -> None:
    """Fill `out`, o or dQ, by a kernel whose programs own tiles of tokens; its arguments begin with inputs, strides."""
    batch, length, heads, d_h = out.shape
    tokens, tiles = batch * length, k.shape[1] * k.shape[2] // rings.block_n
    tiles_m = cdiv(tokens, TOKENS)
    for part in _parts(tiles_m * heads, k.shape[1], out.device):
        partials = part.workspace(out)
        launch(
            kernel, part.grid, out.device,
            *inputs, partials, *strides, tokens, heads // k.shape[0], tiles, tiles_m, part.first, part.share,
            D=d_h, BLOCK_N=rings.block_n, TILES_E=k.shape[2] // rings.block_n, KU_STAGES=rings.ku, V_STAGES=rings.v,
            FAST=triton_backend.gate() == "fast", PARTIAL=part.splits > 1, **more, num_warps=4,
        )  # fmt: skip
        part.add_up(partials, out, tiles_m)


def _backward_weights(
    grad_o: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor, needs_grad: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    grads = [torch.empty_like(w) if needed else None for w, needed in zip((k, u, v), needs_grad, strict=True)]
    for together in BACKWARD_WEIGHTS[k.shape[3]].together:
        wanted = [grad if here else None for grad, here in zip(grads, together, strict=True)]
        if any(grad is not None for grad in wanted):
            _launch_backward_weights(grad_o, q, k, u, v, r, wanted)
    return grads


def _launch_backward_weights(
    grad_o: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor, grads: list[Tensor | None]
) -> None:
    """Fill those of dK, dU, dV that are not None."""
    r_seq = _sequence(r)
    kuv_heads, subnetworks, d_e, d_h = k.shape
    rings = BACKWARD_WEIGHTS[d_h]
    tokens, group = q.shape[0] * q.shape[1], q.shape[2] // kuv_heads
    tiles_m = cdiv(tokens, 2 * rings.tokens)
    programs = kuv_heads * subnetworks * d_e // ROWS
    inputs = (
        *(_tokens(x, rings.tokens, rings.columns) for x in (q, grad_o)),
        *(_rows(w, ROWS, rings.columns) for w in (k, u, v)),
        r_seq,
    )
    need_k, need_u, need_v = (grad is not None for grad in grads)
    for part in _weight_parts(programs, group * tiles_m, q.device):
        rows = part.splits, part.programs * ROWS, d_h
        outs = grads if part.splits == 1 else [_float32(grad, rows) for grad in grads]
        launch(
            gluon_weights.backward_weights_kernel, part.grid, q.device,
            *inputs, *outs, *r_seq.stride()[1:],
            tokens, group, subnetworks * d_e, d_e // ROWS, tiles_m, part.first, part.share,
            D=d_h, Q_STAGES=rings.q, G_STAGES=rings.grad_o, FAST=triton_backend.gate() == "fast",
            NEED_K=need_k, NEED_U=need_u, NEED_V=need_v, num_warps=4,
        )  # fmt: skip
        own = slice(part.first * ROWS, (part.first + part.programs) * ROWS)
        for partials, grad in zip(outs, grads, strict=True):
            if part.splits > 1 and partials is not None and grad is not None:
                triton_backend.sum_splits(partials, grad.view(-1, d_h)[own])


def _float32(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if x is None else x.new_empty(shape, dtype=torch.float32)


def _or_triton(launch: Callable[[], T], fallback: Callable[[], T], *, wanted: bool = True) -> T:
    """Launch, or take the portable kernel: where this one is not wanted or, with one warning, cannot be compiled."""
    if wanted and not _failure:
        triton_backend.gate()  # refuses a wrong setting, which is no failure to compile
        try:
            return launch()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler of another version may raise; the fallback does it all
            reason = str(error).strip().splitlines() or [""]
            _failure.append(f"the gluon kernels do not compile with triton {triton.__version__} ({reason[-1]})")
            warnings.warn(f"mhf_kernels: {_failure[0]}; the triton kernels run instead", stacklevel=2)
    return fallback()


@dataclass(frozen=True)
class Part:
    """Some of a kernel's programs, `first` to `first + programs`, each a tile of tokens of a head or of rows of d_ff.

    Attributes:
        first: number of the first one; 0 unless tiles are shared.
        programs: how many.
        splits: programs that share a tile.
        share: what each of those walks: sub-networks of a tile of tokens, tiles of tokens for a tile of d_ff.
    """

    first: int
    programs: int
    splits: int
    share: int

    @property
    def grid(self) -> tuple[int, int]:
        """Of the launch."""
        return self.programs, self.splits

    def workspace(self, q: Tensor) -> Tensor | None:
        """Return memory for the sums of the splits, if there are any."""
        if self.splits == 1:
            return None
        return torch.empty(self.splits, self.programs, TOKENS, q.shape[3], dtype=torch.float32, device=q.device)

    def add_up(self, partials: Tensor | None, o: Tensor, tiles_m: int) -> None:
        """Write the tiles of these programs into o."""
        if partials is not None:
            batch, length, heads, d_h = o.shape
            launch(
                gluon_kernels.sum_partials_kernel, (self.programs, TOKENS // gluon_kernels.SUM_ROWS.value), o.device,
                partials, o, batch * length, heads, tiles_m, self.first, self.splits, D=d_h, num_warps=4,
            )  # fmt: skip


def _parts(programs: int, subnetworks: int, device: torch.device) -> list[Part]:
    """Cut tiles of tokens into whole waves, one program on each multiprocessor, and a rest.

    Programs of a rest that would leave half of the multiprocessors idle share their tiles, by sub-networks.
    """
    slots = multiprocessors(device)
    rest = programs % slots
    if rest == 0 or slots // rest < 2 or subnetworks == 1:
        return [Part(0, programs, 1, subnetworks)]
    return _with_rest(programs, rest, subnetworks, min(slots // rest, subnetworks))


def _weight_parts(programs: int, tiles: int, device: torch.device) -> list[Part]:
    """Do the same with tiles of d_ff, of which there are few: their waves are long, and a rest is worth more splits.

    A program walks all tiles of tokens; the rest takes the fewest splits that end it soonest.
    """
    slots = multiprocessors(device)
    rest = programs % slots
    most = min(MOST_SPLITS, tiles)
    splits = min(range(1, most + 1), key=lambda n: cdiv(rest * n, slots) * cdiv(tiles, n))
    if rest == 0 or splits == 1:
        return [Part(0, programs, 1, tiles)]
    return _with_rest(programs, rest, tiles, splits)


def _with_rest(programs: int, rest: int, walk: int, splits: int) -> list[Part]:
    """Split the last programs, each of which has so much to walk; the others stay whole."""
    share = cdiv(walk, splits)
    tail = Part(programs - rest, rest, cdiv(walk, share), share)
    return [Part(0, programs - rest, 1, walk), tail] if programs > rest else [tail]


def _fitting(rings: Rings, d_e: int) -> Rings:
    """Halve the tile where it does not divide a sub-network."""
    return rings if d_e % rings.block_n == 0 else Rings(rings.block_n // 2, rings.ku, rings.v)


def _is_matrix(x: Tensor) -> bool:
    """Say whether `[B, L, H, d_h]` lies in memory as rows of `[H * d_h]` at one distance, as TMA reads them."""
    heads, d_h = x.shape[2:]
    return (
        x.stride(3) == 1
        and (heads == 1 or x.stride(2) == d_h)
        and _is_sequence(x)
        and x.data_ptr() % 16 == 0
        and _row_stride(x) > 0  # not one token expanded to many
        and _row_stride(x) % 8 == 0
    )


def _is_sequence(x: Tensor) -> bool:
    """Say whether dimensions 0 and 1 can be seen as one."""
    return x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _tokens(x: Tensor, rows: int = ROWS, columns: int | None = None) -> TensorDescriptor:
    """Describe `[B, L, H, d_h]` as `[tokens, H * d_h]`, in blocks of 64 tokens and one head, or of fewer."""
    batch, length, heads, d_h = x.shape
    shape, strides = [batch * length, heads * d_h], [_row_stride(x), 1]
    return TensorDescriptor(x, shape, strides, [rows, columns or d_h], SWIZZLED)


def _rows(w: Tensor, block: int, columns: int | None = None) -> TensorDescriptor:
    """Describe contiguous weights `[H_kuv, E, d_e, d_h]` as `[rows, d_h]`, in blocks of some rows."""
    d_h = w.shape[3]
    return TensorDescriptor(w, [w.numel() // d_h, d_h], [d_h, 1], [block, columns or d_h], SWIZZLED)


def _sequence(r: Tensor) -> Tensor:
    """View `[B, L, H, E]` as `[1, B * L, H, E]`."""
    return r.view(1, r.shape[0] * r.shape[1], *r.shape[2:])
