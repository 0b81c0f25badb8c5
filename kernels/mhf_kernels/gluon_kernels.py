"""Warp-specialised kernels of the op for Hopper: device code in Gluon. May import triton and nothing else.

A program has one producer warp, which copies tiles to shared memory by TMA, and two consumer warpgroups, which multiply
(wgmma). Rings of buffers lie between them; a buffer has a barrier `full` that its copies complete, and a barrier
`empty` at which its readers arrive. The warpgroups issue their products in turns (`_turns`), except in dK, dU and dV.
Names of the mathematics are those of `triton_kernels`:

    forward    A = r G N             O += A V
    backward   dN = r D G            dM = r D N SiLU'(M)      dR += rowsum(D G N)
               dQ += dM K + dN U     dK += dM^T Q             dU += dN^T Q             dV += A^T dO

Invariants:
- d_e is a multiple of the tile of d_ff, so that the tiles of one head are consecutive rows of K, U and V.
- Tokens past the last one are filled with zeros by TMA: SiLU(0) * 0 = 0, so they add nothing, and are not stored.
- A product that is still running may read its left operand from registers. Each such operand is named in the wait for
  its product: otherwise ptxas before 13.3 may give its registers to others (triton#9433).
- Rings of two buffers or more: K and U for dQ and dR, Q for dK, dU and dV. There a tile's buffer is free only when the
  scores of the next one have been computed.
- There are no branches between products that run (ptxas 12.8 made wrong code of them): what must happen only for some
  tiles is predicated.
- Sums are float32, in a fixed order, without atomics: repeats are bitwise equal.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS: gl.constexpr = gl.constexpr(64)  # of a consumer warpgroup: what one wgmma has


@gluon.jit
def _fast_tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sigmoid(m, FAST: gl.constexpr):
    """Return the logistic function of float32 `m`; FAST: by the hardware's tanh, absolute error up to 2^-12."""
    if FAST:
        t = _fast_tanh(0.5 * m)
        s = 0.5 + 0.5 * t
    else:
        s = 1.0 / (1.0 + gl.exp(-m))
    return s


@gluon.jit
def _hidden(mn, gate, dtype: gl.constexpr, score: gl.constexpr, left: gl.constexpr, FAST: gl.constexpr):
    """Return A = r SiLU(M) N as a left operand; rows are tokens, mn is M beside N."""
    m, n = _halves(mn, score)
    if FAST:  # as in `_sigmoid`, with one operation fewer: m / 2 (1 + tanh(m / 2))
        h = 0.5 * m
        g = h * _fast_tanh(h) + h
    else:
        g = m * _sigmoid(m, FAST)
    return gl.convert_layout((g * n * gate[:, None]).to(dtype), left)


@gluon.jit
def _opaque_zero(i):
    """Return 0, as a value that changes with the loop index `i` for all that the compiler knows.

    Added to the index of a buffer that does not change, it keeps the compiler from holding the descriptors of all such
    buffers in registers, two for each step of each product: it would spill others for them.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [i], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _write(acc, buffer, o, partials, row, column, block, PARTIAL: gl.constexpr):
    """Write the rows of a warpgroup: through shared memory to o, or as they are to block number `block` of partials."""
    if PARTIAL:
        rows = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
        cols = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
        offsets = (block * acc.shape[0] + rows)[:, None].to(gl.int64) * acc.shape[1] + cols[None, :]
        gl.store(partials + offsets, acc)
    else:
        buffer.store(acc.to(buffer.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, [row, column], buffer)
        tma.store_wait(0)


@gluon.jit
def _ring(STAGES: gl.constexpr, readers: gl.constexpr, fills: gl.constexpr):
    """Return the barriers `full` and `empty` of a ring of buffers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=fills)
        mbarrier.init(empty.index(i), count=readers)
    return full, empty


@gluon.jit
def _compute_gate(q, w_buf, gates, WG: gl.constexpr, E: gl.constexpr):
    """Write R of a warpgroup's rows to `gates [2, BLOCK_E, ROWS]` in shared memory.

    w_buf: two tiles `[BLOCK_E, D]`, W of the head in 16 bits and what that leaves of it. R is zero in the padding.
    """
    BLOCK_E: gl.constexpr = w_buf.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    zeros = gl.zeros([ROWS, BLOCK_E], gl.float32, layout)
    p = warpgroup_mma(q, w_buf.index(1).permute((1, 0)), zeros, use_acc=False, is_async=True)
    p = warpgroup_mma(q, w_buf.index(0).permute((1, 0)), p, is_async=True)
    p = warpgroup_mma_wait(0, deps=[p])
    inside = gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, layout)) < E
    s = gl.where(inside[None, :], 1.0 / (1.0 + gl.exp(-p)), 0.0)
    r = s / gl.maximum(gl.sum(s, axis=1), 1e-20)[:, None]
    gates.index(WG).store(gl.permute(r, (1, 0)))


@gluon.jit
def _gate_of(gate_source, WG: gl.constexpr, e, rows, inside, E: gl.constexpr, layout: gl.constexpr):
    """Return R of a sub-network for the rows of a warpgroup: from shared memory, or from r where E is 0."""
    if E:
        gate = gate_source[2].index(WG * gate_source[0].shape[1] + e).load(layout)
    else:
        r, r_l, r_e = gate_source
        gate = gl.load(r + rows.to(gl.int64) * r_l + e.to(gl.int64) * r_e, mask=inside, other=0.0).to(gl.float32)
    return gate


@gluon.jit
def _halves(mn, layout: gl.constexpr):
    """Return M and N, which lie beside one another in mn; no register moves."""
    m, n = gl.split(gl.permute(gl.reshape(mn, [mn.shape[0], 2, mn.shape[1] // 2]), (0, 2, 1)))
    return gl.convert_layout(m, layout, assert_trivial=True), gl.convert_layout(n, layout, assert_trivial=True)


@gluon.jit
def _turns():
    """Return a barrier for each consumer warpgroup, at which the other one says that it has issued its products.

    Warpgroup 0 issues those of a tile first. Then one computes gates while the tensor cores work for the other; without
    turns both would do the same at the same time, and the tensor cores wait for both.
    """
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    return turns


@gluon.jit
def _take_turn(turns, WG: gl.constexpr, i):
    """Wait until the other warpgroup has issued the products of tile i, or of the one before."""
    mbarrier.wait(turns.index(WG), (i + 1 + WG) & 1)


@gluon.jit
def _pass_turn(turns, WG: gl.constexpr):
    mbarrier.arrive(turns.index(1 - WG), count=1)


@gluon.jit
def _forward_consumer(
    WG: gl.constexpr, tokens, weights, gate_source, first, o, partials, block, start, column, length, tiles,
    TILES_E: gl.constexpr, FAST: gl.constexpr, PARTIAL: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    q_buf, q_full, turns = tokens
    ku_buf, v_buf, ku_full, ku_empty, v_full, v_empty = weights
    D: gl.constexpr = q_buf.shape[2]
    BLOCK_N: gl.constexpr = v_buf.shape[1]
    KU_STAGES: gl.constexpr = ku_buf.shape[0]
    V_STAGES: gl.constexpr = v_buf.shape[0]
    dtype: gl.constexpr = q_buf.dtype
    both: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, out, 2)

    rows = start + WG * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, score))
    inside = rows < length
    zeros = gl.zeros([ROWS, 2 * BLOCK_N], gl.float32, both)
    acc = gl.zeros([ROWS, D], gl.float32, out)

    q = q_buf.index(WG)
    mbarrier.wait(q_full, 0)
    if E:
        _compute_gate(q, gate_source[0], gate_source[1], WG, E)
    mbarrier.wait(ku_full.index(0), 0)
    _take_turn(turns, WG, 0)
    mn = warpgroup_mma(q, ku_buf.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    _pass_turn(turns, WG)
    gate = _gate_of(gate_source, WG, first, rows, inside, E, gl.SliceLayout(1, score))
    mn = warpgroup_mma_wait(0, deps=[mn])
    mbarrier.arrive(ku_empty.index(0), count=1)
    a = _hidden(mn, gate, dtype, score, left, FAST)

    # The product with V of one tile runs beside the scores and the gate of the next one.
    for i in range(1, tiles):
        ku = i % KU_STAGES
        vs = (i - 1) % V_STAGES
        mbarrier.wait(ku_full.index(ku), (i // KU_STAGES) & 1)
        mbarrier.wait(v_full.index(vs), ((i - 1) // V_STAGES) & 1)
        gate = _gate_of(gate_source, WG, first + i // TILES_E, rows, inside, E, gl.SliceLayout(1, score))
        _take_turn(turns, WG, i)
        mn = warpgroup_mma(q, ku_buf.index(ku).permute((1, 0)), zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(a, v_buf.index(vs), acc, is_async=True)
        _pass_turn(turns, WG)
        mn = warpgroup_mma_wait(1, deps=[mn])
        mbarrier.arrive(ku_empty.index(ku), count=1)
        following = _hidden(mn, gate, dtype, score, left, FAST)
        acc, a = warpgroup_mma_wait(0, deps=[acc, a])
        mbarrier.arrive(v_empty.index(vs), count=1)
        a = following

    vs = (tiles - 1) % V_STAGES
    mbarrier.wait(v_full.index(vs), ((tiles - 1) // V_STAGES) & 1)
    acc = warpgroup_mma(a, v_buf.index(vs), acc, is_async=True)
    acc, a = warpgroup_mma_wait(0, deps=[acc, a])
    _write(acc, q_buf.index(WG), o, partials, start + WG * ROWS, column, 2 * block + WG, PARTIAL)


@gluon.jit
def _stream_weights(weights, k, u, v, row, tiles):
    """Copy the tiles of K, U and V from `row` on into their rings; the producer's loop."""
    ku_buf, v_buf, ku_full, ku_empty, v_full, v_empty = weights
    BLOCK_N: gl.constexpr = v_buf.shape[1]
    D: gl.constexpr = ku_buf.shape[2]
    KU_STAGES: gl.constexpr = ku_buf.shape[0]
    V_STAGES: gl.constexpr = v_buf.shape[0]
    for i in range(tiles):
        ku = i % KU_STAGES
        full = ku_full.index(ku)
        mbarrier.wait(ku_empty.index(ku), ((i // KU_STAGES) & 1) ^ 1)
        mbarrier.expect(full, 2 * BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(k, [row + i * BLOCK_N, 0], full, ku_buf.index(ku).slice(0, BLOCK_N))
        tma.async_copy_global_to_shared(u, [row + i * BLOCK_N, 0], full, ku_buf.index(ku).slice(BLOCK_N, BLOCK_N))
        vs = i % V_STAGES
        full = v_full.index(vs)
        mbarrier.wait(v_empty.index(vs), ((i // V_STAGES) & 1) ^ 1)
        mbarrier.expect(full, BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(v, [row + i * BLOCK_N, 0], full, v_buf.index(vs))


@gluon.jit
def _forward_producer(tokens, weights, gate_source, q, k, u, v, w, start, column, row, tiles, head, E: gl.constexpr):
    q_buf, q_full, _ = tokens
    if E:
        w_buf = gate_source[0]
        BLOCK_E: gl.constexpr = w_buf.shape[1]
        mbarrier.expect(q_full, (2 * ROWS + 2 * BLOCK_E) * q_buf.shape[2] * 2)
        for part in gl.static_range(2):
            tma.async_copy_global_to_shared(w, [(2 * head + part) * BLOCK_E, 0], q_full, w_buf.index(part))
    else:
        mbarrier.expect(q_full, 2 * ROWS * q_buf.shape[2] * 2)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [start + half * ROWS, column], q_full, q_buf.index(half))
    _stream_weights(weights, k, u, v, row, tiles)


@gluon.jit
def _weight_rings(
    k, BLOCK_N: gl.constexpr, D: gl.constexpr, KU_STAGES: gl.constexpr, V_STAGES: gl.constexpr
):  # fmt: skip
    """Return rings of tiles of K and U, which lie behind one another, and of V, for two readers each."""
    ku_buf = gl.allocate_shared_memory(k.dtype, [KU_STAGES, 2 * BLOCK_N, D], k.layout)
    v_buf = gl.allocate_shared_memory(k.dtype, [V_STAGES, BLOCK_N, D], k.layout)
    ku_full, ku_empty = _ring(KU_STAGES, 2, 1)
    v_full, v_empty = _ring(V_STAGES, 2, 1)
    return ku_buf, v_buf, ku_full, ku_empty, v_full, v_empty


@gluon.jit
def forward_kernel(
    q, k, u, v, r, w, o, partials, r_l, r_h, r_e,
    length, group, tiles, tiles_m, first_program, subnetworks,
    D: gl.constexpr, BLOCK_N: gl.constexpr, TILES_E: gl.constexpr,
    KU_STAGES: gl.constexpr, V_STAGES: gl.constexpr, FAST: gl.constexpr, PARTIAL: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Write O of 128 tokens of one head; PARTIAL: what some of its sub-networks add to it, as float32, to partials.

    Grid `(programs, splits)`; a split has `subnetworks` sub-networks. Program p is tile `p % tiles_m` of the tokens of
    head `p // tiles_m`, so that programs which run together share K, U, V in L2; the grid begins at first_program.
    q, o: descriptors of `[tokens, heads * D]`; k, u, v: of `[kuv heads * d_ff, D]`; r: `[tokens, heads, E]` by strides;
    partials: `[splits, programs, 128, D]`. tiles: of d_ff, in one head. Where E is not 0, the gate is computed from w,
    a descriptor of `[heads * 2 * BLOCK_E, D]` (see `_compute_gate`), and r is not there.
    """
    pid = gl.program_id(0) + first_program
    start = (pid % tiles_m) * (2 * ROWS)
    head = pid // tiles_m
    first = gl.program_id(1) * subnetworks
    block = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    row = (head // group) * (tiles * BLOCK_N) + first * (TILES_E * BLOCK_N)
    tiles = gl.minimum(tiles - first * TILES_E, subnetworks * TILES_E)

    q_buf = gl.allocate_shared_memory(q.dtype, [2, ROWS, D], q.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    turns = _turns()
    weights = _weight_rings(k, BLOCK_N, D, KU_STAGES, V_STAGES)
    if E:
        BLOCK_E: gl.constexpr = w.block_type.shape[0]
        columns: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
        a_row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        w_buf = gl.allocate_shared_memory(w.dtype, [2, BLOCK_E, D], w.layout)
        gates = gl.allocate_shared_memory(gl.float32, [2, BLOCK_E, ROWS], columns)
        gate_source = (w_buf, gates, gates._reinterpret(gl.float32, [2 * BLOCK_E, ROWS], a_row))
    else:
        gate_source = (r + head.to(gl.int64) * r_h, r_l, r_e)
    tokens = (q_buf, q_full, turns)
    fence_async_shared()
    column = head * D
    gl.warp_specialize(
        [
            (
                _forward_consumer,
                (
                    0, tokens, weights, gate_source, first, o, partials, block, start, column, length, tiles,
                    TILES_E, FAST, PARTIAL, E,
                ),
            ),
            (
                _forward_consumer,
                (
                    1, tokens, weights, gate_source, first, o, partials, block, start, column, length, tiles,
                    TILES_E, FAST, PARTIAL, E,
                ),
            ),
            (_forward_producer, (tokens, weights, gate_source, q, k, u, v, w, start, column, row, tiles, head, E)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _backward_tokens_consumer(
    WG: gl.constexpr, tokens, weights, r, r_l, r_e, dq, dr, dr_l, dr_e, partials, block, start, column, length, tiles,
    TILES_E: gl.constexpr, FAST: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    q_buf, g_buf, q_full, turns = tokens
    ku_buf, v_buf, ku_full, ku_empty, v_full, v_empty = weights
    D: gl.constexpr = q_buf.shape[2]
    BLOCK_N: gl.constexpr = v_buf.shape[1]
    KU_STAGES: gl.constexpr = ku_buf.shape[0]
    V_STAGES: gl.constexpr = v_buf.shape[0]
    dtype: gl.constexpr = q_buf.dtype
    both: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, out, 2)

    rows = start + WG * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, score))
    r_rows = r + rows.to(gl.int64) * r_l
    dr_rows = dr + rows.to(gl.int64) * dr_l
    inside = rows < length
    zeros_both = gl.zeros([ROWS, 2 * BLOCK_N], gl.float32, both)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score)
    acc = gl.zeros([ROWS, D], gl.float32, out)
    dr_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, score))

    q = q_buf.index(WG)
    g = g_buf.index(WG)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(ku_full.index(0), 0)
    mbarrier.wait(v_full.index(0), 0)
    _take_turn(turns, WG, 0)
    mn = warpgroup_mma(q, ku_buf.index(0).permute((1, 0)), zeros_both, use_acc=False, is_async=True)
    d = warpgroup_mma(g, v_buf.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    _pass_turn(turns, WG)
    gate = gl.load(r_rows, mask=inside, other=0.0).to(gl.float32)
    mn, d = warpgroup_mma_wait(0, deps=[mn, d])
    mbarrier.arrive(v_empty.index(0), count=1)
    dm, dn, dr_part = _score_gradients(mn, d, gate, dtype, score, left, FAST)
    dr_sum += dr_part
    gl.store(dr_rows, dr_sum.to(dr.dtype.element_ty), mask=inside & (TILES_E == 1))
    if TILES_E == 1:
        dr_sum = dr_sum * 0

    # The products of one tile that go into dQ run beside the scores and their gradients of the next one.
    for i in range(1, tiles):
        zero = _opaque_zero(i)
        q = q_buf.index(zero + WG)
        g = g_buf.index(zero + WG)
        ku = i % KU_STAGES
        vs = i % V_STAGES
        before = (i - 1) % KU_STAGES
        mbarrier.wait(ku_full.index(ku), (i // KU_STAGES) & 1)
        mbarrier.wait(v_full.index(vs), (i // V_STAGES) & 1)
        _take_turn(turns, WG, i)
        mn = warpgroup_mma(q, ku_buf.index(ku).permute((1, 0)), zeros_both, use_acc=False, is_async=True)
        d = warpgroup_mma(g, v_buf.index(vs).permute((1, 0)), zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(dm, ku_buf.index(before).slice(0, BLOCK_N), acc, is_async=True)
        acc = warpgroup_mma(dn, ku_buf.index(before).slice(BLOCK_N, BLOCK_N), acc, is_async=True)
        _pass_turn(turns, WG)
        e = i // TILES_E
        gate = gl.load(r_rows + e.to(gl.int64) * r_e, mask=inside, other=0.0).to(gl.float32)
        mn, d = warpgroup_mma_wait(2, deps=[mn, d])
        mbarrier.arrive(v_empty.index(vs), count=1)
        dm_next, dn_next, dr_part = _score_gradients(mn, d, gate, dtype, score, left, FAST)
        acc, dm, dn = warpgroup_mma_wait(0, deps=[acc, dm, dn])
        mbarrier.arrive(ku_empty.index(before), count=1)
        dm = dm_next
        dn = dn_next
        dr_sum += dr_part
        last = i % TILES_E == TILES_E - 1
        gl.store(dr_rows + e.to(gl.int64) * dr_e, dr_sum.to(dr.dtype.element_ty), mask=inside & last)
        dr_sum = gl.where(last, 0.0, dr_sum)

    before = (tiles - 1) % KU_STAGES
    acc = warpgroup_mma(dm, ku_buf.index(before).slice(0, BLOCK_N), acc, is_async=True)
    acc = warpgroup_mma(dn, ku_buf.index(before).slice(BLOCK_N, BLOCK_N), acc, is_async=True)
    acc, dm, dn = warpgroup_mma_wait(0, deps=[acc, dm, dn])
    _write(acc, q_buf.index(WG), dq, partials, start + WG * ROWS, column, 2 * block + WG, PARTIAL)


@gluon.jit
def _score_gradients(mn, d, gate, dtype: gl.constexpr, score: gl.constexpr, left: gl.constexpr, FAST: gl.constexpr):
    """Return dM and dN as left operands, and what this tile adds to dR; rows are tokens, mn is M beside N."""
    m, n = _halves(mn, score)
    s = _sigmoid(m, FAST)
    g = m * s
    dr = gl.sum(d * g * n, axis=1)
    d = d * gate[:, None]
    dn = gl.convert_layout((d * g).to(dtype), left)
    dm = gl.convert_layout((d * n * (s + g * (1.0 - s))).to(dtype), left)
    return dm, dn, dr


@gluon.jit
def _backward_tokens_producer(tokens, weights, q, grad_o, k, u, v, start, column, row, tiles):
    q_buf, g_buf, q_full, _ = tokens
    mbarrier.expect(q_full, 4 * ROWS * q_buf.shape[2] * 2)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [start + half * ROWS, column], q_full, q_buf.index(half))
        tma.async_copy_global_to_shared(grad_o, [start + half * ROWS, column], q_full, g_buf.index(half))
    _stream_weights(weights, k, u, v, row, tiles)


@gluon.jit
def backward_tokens_kernel(
    q, grad_o, k, u, v, r, dq, dr, partials, r_l, r_h, r_e, dr_l, dr_h, dr_e,
    length, group, tiles, tiles_m, first_program, subnetworks,
    D: gl.constexpr, BLOCK_N: gl.constexpr, TILES_E: gl.constexpr,
    KU_STAGES: gl.constexpr, V_STAGES: gl.constexpr, FAST: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Write dQ and dR of 128 tokens of one head; all arguments, and partials (of dQ), as in `forward_kernel`."""
    pid = gl.program_id(0) + first_program
    start = (pid % tiles_m) * (2 * ROWS)
    head = pid // tiles_m
    first = gl.program_id(1) * subnetworks
    block = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    row = (head // group) * (tiles * BLOCK_N) + first * (TILES_E * BLOCK_N)
    tiles = gl.minimum(tiles - first * TILES_E, subnetworks * TILES_E)
    r += head.to(gl.int64) * r_h + first.to(gl.int64) * r_e
    dr += head.to(gl.int64) * dr_h + first.to(gl.int64) * dr_e

    q_buf = gl.allocate_shared_memory(q.dtype, [2, ROWS, D], q.layout)
    g_buf = gl.allocate_shared_memory(q.dtype, [2, ROWS, D], q.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    turns = _turns()
    weights = _weight_rings(k, BLOCK_N, D, KU_STAGES, V_STAGES)
    tokens = (q_buf, g_buf, q_full, turns)
    fence_async_shared()
    column = head * D
    gl.warp_specialize(
        [
            (
                _backward_tokens_consumer,
                (
                    0, tokens, weights, r, r_l, r_e, dq, dr, dr_l, dr_e, partials, block, start, column, length, tiles,
                    TILES_E, FAST, PARTIAL,
                ),
            ),
            (
                _backward_tokens_consumer,
                (
                    1, tokens, weights, r, r_l, r_e, dq, dr, dr_l, dr_e, partials, block, start, column, length, tiles,
                    TILES_E, FAST, PARTIAL,
                ),
            ),
            (_backward_tokens_producer, (tokens, weights, q, grad_o, k, u, v, start, column, row, tiles)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


SUM_ROWS: gl.constexpr = gl.constexpr(8)  # of a program of sum_partials_kernel


@gluon.jit
def sum_partials_kernel(partials, o, length, heads, tiles_m, first_program, splits, D: gl.constexpr):
    """Write into o the sums over splits of `partials [splits, programs, 128, D]`. Grid `(programs, 128 / SUM_ROWS)`."""
    program = gl.program_id(0)
    pid = program + first_program
    layout: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [4, 1], [1, 0])
    rows = gl.program_id(1) * SUM_ROWS + gl.arange(0, SUM_ROWS, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    total = gl.zeros([SUM_ROWS, D], gl.float32, layout)
    for split in range(splits):
        block = (split * gl.num_programs(0) + program).to(gl.int64) * (2 * ROWS)
        total += gl.load(partials + (block + rows)[:, None] * D + cols[None, :])
    token = (pid % tiles_m) * (2 * ROWS) + rows
    offsets = (token.to(gl.int64) * heads + pid // tiles_m)[:, None] * D + cols[None, :]
    gl.store(o + offsets, total.to(o.dtype.element_ty), mask=(token < length)[:, None])


@gluon.jit
def _over_d_h(w_buf, x_buf, at, zeros, zero):
    """Begin the product of 64 rows of d_ff with tokens, block `at` of x_buf and the next: `[rows of d_ff, tokens]`."""
    p = warpgroup_mma(w_buf.index(zero), x_buf.index(at).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if w_buf.shape[0] == 2:
        p = warpgroup_mma(w_buf.index(zero + 1), x_buf.index(at + 1).permute((1, 0)), p, is_async=True)
    return p


@gluon.jit
def _weight_scores(WG: gl.constexpr, k_buf, u_buf, q_buf, zeros, stage, zero):
    """Begin M and N of this warpgroup's tokens of a tile."""
    mine = k_buf.shape[0] * (2 * stage + WG)
    return _over_d_h(k_buf, q_buf, mine, zeros, zero), _over_d_h(u_buf, q_buf, mine, zeros, zero)


@gluon.jit
def _wait_for_grad_o(g_ring, i, APART: gl.constexpr):
    """Wait for tile i of dO, where it does not come with that of Q."""
    if APART:
        STAGES: gl.constexpr = g_ring[1].shape[0]
        mbarrier.wait(g_ring[1].index(i % STAGES), (i // STAGES) & 1)


@gluon.jit
def _free_grad_o(g_ring, i, APART: gl.constexpr):
    """Let tile i of dO be overwritten, where that does not wait for Q."""
    if APART:
        mbarrier.arrive(g_ring[2].index(i % g_ring[2].shape[0]), count=1)


@gluon.jit
def _hand_over(buffer, x, ready, NEEDED: gl.constexpr):
    """Give x to the other warpgroup; the barrier also says that this one is past the products before."""
    if NEEDED:
        buffer.store(x)
        fence_async_shared()
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _weight_products(
    WG: gl.constexpr, m, n, dk_acc, du_acc, dv_acc, v_buf, q_ring, g_ring, scores, zeros, i, zero,
    FAST: gl.constexpr, NEED_KU: gl.constexpr, NEED_V: gl.constexpr,
):  # fmt: skip
    """Add tile i to the sums; those of dK and dU still run at the end, and read dM and dN, which are returned."""
    q_buf, r_buf, _, _ = q_ring
    g_buf, _, _ = g_ring
    HALVES: gl.constexpr = v_buf.shape[0]
    Q_STAGES: gl.constexpr = q_buf.shape[0] // (2 * HALVES)
    G_STAGES: gl.constexpr = g_buf.shape[0] // (2 * HALVES)
    OTHER: gl.constexpr = 1 - WG
    dtype: gl.constexpr = q_buf.dtype
    score: gl.constexpr = m.type.layout
    columns: gl.constexpr = gl.SliceLayout(0, score)
    left: gl.constexpr = gl.DotOperandLayout(0, dk_acc.type.layout, 2)
    # Of a tile: my tokens; the same, in those columns of d_h whose sums this warpgroup owns; the others, in the same.
    mine: gl.constexpr = HALVES * WG
    own: gl.constexpr = mine + (HALVES - 1) * WG
    others: gl.constexpr = HALVES * OTHER + WG
    q_at = 2 * HALVES * (i % Q_STAGES)
    g_at = 2 * HALVES * (i % G_STAGES)
    _wait_for_grad_o(g_ring, i, Q_STAGES != G_STAGES)
    d = zeros
    if NEED_KU:
        d = _over_d_h(v_buf, g_buf, g_at + mine, zeros, zero)
    gate = r_buf.index(2 * (i % Q_STAGES) + WG).load(columns)
    s = _sigmoid(m, FAST)
    g = m * s
    n = n * gate[None, :]
    a = (g * n).to(dtype)
    if HALVES == 2:
        a_buf, dn_buf, dm_buf, a_ready, d_ready = scores
        _hand_over(a_buf.index(WG), a, a_ready, NEED_V)
    a = gl.convert_layout(a, left)
    slope = n * (s + g * (1.0 - s))
    g = g * gate[None, :]
    if NEED_V:
        dv_acc = warpgroup_mma(a, g_buf.index(g_at + own), dv_acc, is_async=True)
    if HALVES == 2:
        mbarrier.wait(a_ready, i & 1)
        if NEED_V:
            dv_acc = warpgroup_mma(a_buf.index(zero + OTHER), g_buf.index(g_at + others), dv_acc, is_async=True)
    dn, dm = a, a  # where nobody wants them
    if NEED_KU:
        d = warpgroup_mma_wait(HALVES if NEED_V else 0, deps=[d])
        dn = (d * g).to(dtype)
        dm = (d * slope).to(dtype)
    # Both warpgroups have read A when both are past d_ready, and dN and dM of the tile before past a_ready.
    if NEED_V:
        dv_acc, a = warpgroup_mma_wait(0, deps=[dv_acc, a])
    _free_grad_o(g_ring, i, Q_STAGES != G_STAGES)
    if HALVES == 2:
        if NEED_KU:
            dn_buf.index(WG).store(dn)  # the fence of the next line is for dN, too
        _hand_over(dm_buf.index(WG), dm, d_ready, NEED_KU)
    dn = gl.convert_layout(dn, left)
    dm = gl.convert_layout(dm, left)
    if NEED_KU:
        du_acc = warpgroup_mma(dn, q_buf.index(q_at + own), du_acc, is_async=True)
        dk_acc = warpgroup_mma(dm, q_buf.index(q_at + own), dk_acc, is_async=True)
    if HALVES == 2:
        mbarrier.wait(d_ready, i & 1)
        if NEED_KU:
            du_acc = warpgroup_mma(dn_buf.index(zero + OTHER), q_buf.index(q_at + others), du_acc, is_async=True)
            dk_acc = warpgroup_mma(dm_buf.index(zero + OTHER), q_buf.index(q_at + others), dk_acc, is_async=True)
    return dk_acc, du_acc, dv_acc, dn, dm


@gluon.jit
def _backward_weights_consumer(
    WG: gl.constexpr, weights, q_ring, g_ring, scores, dk, du, dv, out_row, tiles,
    FAST: gl.constexpr, NEED_K: gl.constexpr, NEED_U: gl.constexpr, NEED_V: gl.constexpr,
):  # fmt: skip
    k_buf, u_buf, v_buf, w_full = weights
    q_buf, _, full, empty = q_ring
    HALVES: gl.constexpr = k_buf.shape[0]
    COLUMNS: gl.constexpr = k_buf.shape[2]
    TOKENS: gl.constexpr = q_buf.shape[1]
    STAGES: gl.constexpr = q_buf.shape[0] // (2 * HALVES)
    NEED_KU: gl.constexpr = NEED_K or NEED_U
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])

    zeros = gl.zeros([ROWS, TOKENS], gl.float32, score)
    dv_acc = gl.zeros([ROWS, COLUMNS], gl.float32, out)
    du_acc = gl.zeros([ROWS, COLUMNS], gl.float32, out)
    dk_acc = gl.zeros([ROWS, COLUMNS], gl.float32, out)
    mbarrier.wait(w_full, 0)
    mbarrier.wait(full.index(0), 0)
    m, n = _weight_scores(WG, k_buf, u_buf, q_buf, zeros, 0, 0)
    m, n = warpgroup_mma_wait(0, deps=[m, n])
    # The scores of a tile run behind the products of the one before, so that nothing waits for them.
    for i in range(tiles - 1):
        zero = _opaque_zero(i)
        dk_acc, du_acc, dv_acc, dn, dm = _weight_products(
            WG, m, n, dk_acc, du_acc, dv_acc, v_buf, q_ring, g_ring, scores, zeros, i, zero, FAST, NEED_KU, NEED_V
        )
        following = (i + 1) % STAGES
        mbarrier.wait(full.index(following), ((i + 1) // STAGES) & 1)
        m, n = _weight_scores(WG, k_buf, u_buf, q_buf, zeros, following, zero)
        m, n, du_acc, dk_acc, dn, dm = warpgroup_mma_wait(0, deps=[m, n, du_acc, dk_acc, dn, dm])
        mbarrier.arrive(empty.index(i % STAGES), count=1)
    dk_acc, du_acc, dv_acc, dn, dm = _weight_products(
        WG, m, n, dk_acc, du_acc, dv_acc, v_buf, q_ring, g_ring, scores, zeros, tiles - 1, 0, FAST, NEED_KU, NEED_V
    )
    du_acc, dk_acc, dn, dm = warpgroup_mma_wait(0, deps=[du_acc, dk_acc, dn, dm])

    if HALVES == 2:
        _write_sums(WG * COLUMNS, dk_acc, du_acc, dv_acc, dk, du, dv, out_row, 2 * COLUMNS, NEED_K, NEED_U, NEED_V)
    else:  # each warpgroup has the sums of its own tokens
        sums, ready = scores
        if WG == 1:
            sums.index(0).store(dk_acc)
            sums.index(1).store(du_acc)
            sums.index(2).store(dv_acc)
            mbarrier.arrive(ready, count=1)
        else:
            mbarrier.wait(ready, 0)
            dk_acc += sums.index(0).load(out)
            du_acc += sums.index(1).load(out)
            dv_acc += sums.index(2).load(out)
            _write_sums(0, dk_acc, du_acc, dv_acc, dk, du, dv, out_row, COLUMNS, NEED_K, NEED_U, NEED_V)


@gluon.jit
def _write_sums(
    column, dk_acc, du_acc, dv_acc, dk, du, dv, out_row, D: gl.constexpr,
    NEED_K: gl.constexpr, NEED_U: gl.constexpr, NEED_V: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's columns of dK, dU and dV, from `column` on, for 64 rows of d_ff."""
    layout: gl.constexpr = dk_acc.type.layout
    rows = out_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    cols = column + gl.arange(0, dk_acc.shape[1], layout=gl.SliceLayout(0, layout))
    offsets = rows.to(gl.int64)[:, None] * D + cols[None, :]
    if NEED_K:
        gl.store(dk + offsets, dk_acc.to(dk.dtype.element_ty))
    if NEED_U:
        gl.store(du + offsets, du_acc.to(du.dtype.element_ty))
    if NEED_V:
        gl.store(dv + offsets, dv_acc.to(dv.dtype.element_ty))


@gluon.jit
def _backward_weights_producer(
    weights, q_ring, g_ring, q, grad_o, k, u, v, r, r_l, r_h, length, first_head, tiles_m, row, first, tiles
):
    k_buf, u_buf, v_buf, w_full = weights
    q_buf, r_buf, q_full, q_empty = q_ring
    g_buf, g_full, g_empty = g_ring
    HALVES: gl.constexpr = k_buf.shape[0]
    COLUMNS: gl.constexpr = k_buf.shape[2]
    TOKENS: gl.constexpr = q_buf.shape[1]
    BLOCKS: gl.constexpr = 2 * HALVES  # of a tile
    Q_STAGES: gl.constexpr = q_buf.shape[0] // BLOCKS
    G_STAGES: gl.constexpr = g_buf.shape[0] // BLOCKS
    APART: gl.constexpr = Q_STAGES != G_STAGES
    mbarrier.expect(w_full, 3 * HALVES * ROWS * COLUMNS * 2)
    for half in gl.static_range(HALVES):
        tma.async_copy_global_to_shared(k, [row, half * COLUMNS], w_full, k_buf.index(half))
        tma.async_copy_global_to_shared(u, [row, half * COLUMNS], w_full, u_buf.index(half))
        tma.async_copy_global_to_shared(v, [row, half * COLUMNS], w_full, v_buf.index(half))
    token = gl.arange(0, TOKENS, layout=gl.BlockedLayout([TOKENS // 32], [32], [1], [0]))
    for i in range(tiles):
        head = first_head + (first + i) // tiles_m
        start = ((first + i) % tiles_m) * (2 * TOKENS)
        stage = i % Q_STAGES
        bar = q_full.index(stage)
        mbarrier.wait(q_empty.index(stage), ((i // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BLOCKS * TOKENS * COLUMNS * (2 if APART else 4))
        for part in gl.static_range(BLOCKS):
            at = [start + (part // HALVES) * TOKENS, (HALVES * head + part % HALVES) * COLUMNS]
            tma.async_copy_global_to_shared(q, at, bar, q_buf.index(BLOCKS * stage + part))
            if not APART:
                tma.async_copy_global_to_shared(grad_o, at, bar, g_buf.index(BLOCKS * stage + part))
        r_head = r + head.to(gl.int64) * r_h
        for part in gl.static_range(2):
            rows = start + part * TOKENS + token
            gate = gl.load(r_head + rows.to(gl.int64) * r_l, mask=rows < length, other=0.0)
            r_buf.index(2 * stage + part).store(gate.to(gl.float32))
        mbarrier.arrive(bar, count=1)
        if APART:
            stage = i % G_STAGES
            bar = g_full.index(stage)
            mbarrier.wait(g_empty.index(stage), ((i // G_STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BLOCKS * TOKENS * COLUMNS * 2)
            for part in gl.static_range(BLOCKS):
                at = [start + (part // HALVES) * TOKENS, (HALVES * head + part % HALVES) * COLUMNS]
                tma.async_copy_global_to_shared(grad_o, at, bar, g_buf.index(BLOCKS * stage + part))


@gluon.jit
def _exchange(dtype: gl.constexpr, TOKENS: gl.constexpr, COLUMNS: gl.constexpr, HALVES: gl.constexpr):
    """Allocate what the warpgroups give each other, with barriers: A, dN and dM of each tile, or sums at the end."""
    if HALVES == 2:
        layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * TOKENS, element_bitwidth=16, rank=2)
        a_buf = gl.allocate_shared_memory(dtype, [2, ROWS, TOKENS], layout)
        dn_buf = gl.allocate_shared_memory(dtype, [2, ROWS, TOKENS], layout)
        dm_buf = gl.allocate_shared_memory(dtype, [2, ROWS, TOKENS], layout)
        a_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        d_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(a_ready, count=2)
        mbarrier.init(d_ready, count=2)
        return a_buf, dn_buf, dm_buf, a_ready, d_ready
    else:
        unswizzled: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
        sums = gl.allocate_shared_memory(gl.float32, [3, ROWS, COLUMNS], unswizzled)
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(ready, count=1)
        return sums, ready


@gluon.jit
def backward_weights_kernel(
    q, grad_o, k, u, v, r, dk, du, dv, r_l, r_h, r_e,
    length, group, d_ff, blocks_e, tiles_m, first_program, share,
    D: gl.constexpr, Q_STAGES: gl.constexpr, G_STAGES: gl.constexpr, FAST: gl.constexpr,
    NEED_K: gl.constexpr, NEED_U: gl.constexpr, NEED_V: gl.constexpr,
):  # fmt: skip
    """Write those of dK, dU and dV that are needed, 64 rows of d_ff; with splits, what some of the tokens add to them.

    Grid `(programs, splits)`; a split walks `share` tiles of tokens. Program p owns block `p` of 64 rows, counted over
    the K/U/V heads; the grid begins at first_program. dk, du, dv: `[kuv heads * d_ff, D]`, or with splits
    `[splits, programs * 64, D]`, float32. Each warpgroup computes the scores of half of a tile's tokens, as
    `[rows of d_ff, tokens]`. For d_h above 64 it owns the sums of half of d_h: A, dN and dM of the other half of the
    tokens come through shared memory. (The sums for all of d_h = 128 would take 192 registers a thread, and leave too
    few for the scores. Half of 256 is as much, so there dV is to be had by a launch of its own.) At 64 it owns those of
    its tokens; the two are added at the end. The query heads of one K/U/V head are so many more tiles. blocks_e: blocks
    of 64 rows in a sub-network. The blocks of the descriptors: k, u, v `[64, d_h or half of it]`; q, grad_o as many
    columns, of half of a tile's tokens.
    """
    row = (gl.program_id(0) + first_program) * ROWS
    out_row = (gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)) * ROWS
    kuv = row // d_ff
    e = ((row % d_ff) // ROWS) // blocks_e
    first = gl.program_id(1) * share
    tiles = gl.minimum(group * tiles_m - first, share)

    TOKENS: gl.constexpr = q.block_type.shape[0]
    COLUMNS: gl.constexpr = q.block_type.shape[1]
    HALVES: gl.constexpr = D // COLUMNS
    k_buf = gl.allocate_shared_memory(k.dtype, [HALVES, ROWS, COLUMNS], k.layout)
    u_buf = gl.allocate_shared_memory(k.dtype, [HALVES, ROWS, COLUMNS], k.layout)
    v_buf = gl.allocate_shared_memory(k.dtype, [HALVES, ROWS, COLUMNS], k.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(w_full, count=1)
    q_buf = gl.allocate_shared_memory(q.dtype, [2 * HALVES * Q_STAGES, TOKENS, COLUMNS], q.layout)
    g_buf = gl.allocate_shared_memory(q.dtype, [2 * HALVES * G_STAGES, TOKENS, COLUMNS], q.layout)
    r_buf = gl.allocate_shared_memory(gl.float32, [2 * Q_STAGES, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full, q_empty = _ring(Q_STAGES, 2, 2)
    if Q_STAGES == G_STAGES:  # dO comes and goes with Q: a wait and an arrival less for each tile
        g_full, g_empty = q_full, q_empty
    else:
        g_full, g_empty = _ring(G_STAGES, 2, 1)
    scores = _exchange(q.dtype, TOKENS, COLUMNS, HALVES)
    weights = (k_buf, u_buf, v_buf, w_full)
    q_ring = (q_buf, r_buf, q_full, q_empty)
    g_ring = (g_buf, g_full, g_empty)
    fence_async_shared()
    r += e.to(gl.int64) * r_e
    gl.warp_specialize(
        [
            (
                _backward_weights_consumer,
                (0, weights, q_ring, g_ring, scores, dk, du, dv, out_row, tiles, FAST, NEED_K, NEED_U, NEED_V),
            ),
            (
                _backward_weights_consumer,
                (1, weights, q_ring, g_ring, scores, dk, du, dv, out_row, tiles, FAST, NEED_K, NEED_U, NEED_V),
            ),
            (
                _backward_weights_producer,
                (
                    weights, q_ring, g_ring, q, grad_o, k, u, v, r, r_l, r_h,
                    length, kuv * group, tiles_m, row, first, tiles,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
