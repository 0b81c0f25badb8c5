"""The forward, dQ and dR for Hopper: device code in Gluon, built as `gluon_common` says. May import it and triton.

A program owns 128 tokens of one head, 64 for each consumer warpgroup, and walks tiles of d_ff. The warpgroups issue
their products in turns (`_turns`). For dQ and dR the ring of K and U has two buffers or more: a tile's buffer is free
only when the scores of the next one have been computed.
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

from mhf_kernels.gluon_common import ROWS, fast_tanh, opaque_zero, ring, sigmoid


@gluon.jit
def _hidden(mn, gate, dtype: gl.constexpr, score: gl.constexpr, left: gl.constexpr, FAST: gl.constexpr):
    """Return A = r SiLU(M) N as a left operand; rows are tokens, mn is M beside N."""
    m, n = _halves(mn, score)
    if FAST:  # as in `sigmoid`, with one operation fewer: m / 2 (1 + tanh(m / 2))
        h = 0.5 * m
        g = h * fast_tanh(h) + h
    else:
        g = m * sigmoid(m, FAST)
    return gl.convert_layout((g * n * gate[:, None]).to(dtype), left)


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
    ku_full, ku_empty = ring(KU_STAGES, 2, 1)
    v_full, v_empty = ring(V_STAGES, 2, 1)
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
        zero = opaque_zero(i)
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
    s = sigmoid(m, FAST)
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
