"""dK, dU and dV for Hopper: device code in Gluon, built as `gluon_common` says. May import it and triton.

A program owns 64 rows of d_ff and walks tiles of tokens, which the consumer warpgroups share (`backward_weights_kernel`
says how). The ring of Q has two buffers or more: a tile's buffer is free only when the scores of the next one have been
computed.
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

from mhf_kernels.gluon_common import ROWS, opaque_zero, ring, sigmoid


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
    s = sigmoid(m, FAST)
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
        zero = opaque_zero(i)
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
def _copy_tile(inputs, buffers, full, empty, i, start, head, HALVES: gl.constexpr):
    """Copy tile i of Q, of dO, or of both in turn, into its ring; it begins at token `start`."""
    BLOCKS: gl.constexpr = 2 * HALVES  # of a tile
    STAGES: gl.constexpr = full.shape[0]
    TOKENS: gl.constexpr = buffers[0].shape[1]
    COLUMNS: gl.constexpr = buffers[0].shape[2]
    stage = i % STAGES
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(bar, len(inputs) * BLOCKS * TOKENS * COLUMNS * 2)
    for part in gl.static_range(BLOCKS):
        at = [start + (part // HALVES) * TOKENS, (HALVES * head + part % HALVES) * COLUMNS]
        for n in gl.static_range(len(inputs)):
            tma.async_copy_global_to_shared(inputs[n], at, bar, buffers[n].index(BLOCKS * stage + part))


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
    Q_STAGES: gl.constexpr = q_full.shape[0]
    G_STAGES: gl.constexpr = g_full.shape[0]
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
        if APART:
            _copy_tile((q,), (q_buf,), q_full, q_empty, i, start, head, HALVES)
        else:
            _copy_tile((q, grad_o), (q_buf, g_buf), q_full, q_empty, i, start, head, HALVES)
        stage = i % Q_STAGES
        r_head = r + head.to(gl.int64) * r_h
        for part in gl.static_range(2):
            rows = start + part * TOKENS + token
            gate = gl.load(r_head + rows.to(gl.int64) * r_l, mask=rows < length, other=0.0)
            r_buf.index(2 * stage + part).store(gate.to(gl.float32))
        mbarrier.arrive(q_full.index(stage), count=1)
        if APART:
            _copy_tile((grad_o,), (g_buf,), g_full, g_empty, i, start, head, HALVES)


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
    q_full, q_empty = ring(Q_STAGES, 2, 2)
    if Q_STAGES == G_STAGES:  # dO comes and goes with Q: a wait and an arrival less for each tile
        g_full, g_empty = q_full, q_empty
    else:
        g_full, g_empty = ring(G_STAGES, 2, 1)
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
