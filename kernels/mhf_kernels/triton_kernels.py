"""The portable Triton kernels of the op: device code only. May import triton and nothing else.

Names in here: a program owns a tile of BLOCK_M tokens or of BLOCK_N columns of d_ff, and walks the other dimension.
With `M = Q K^T`, `N = Q U^T`, `G = SiLU(M)`, `D = dO V^T` of a tile and the gate `r` of its sub-network:

    forward    A = r G N             O += A V
    backward   dN = r D G            dM = r D N SiLU'(M)      dR += rowsum(D G N)
               dQ += dM K + dN U     dK += dM^T Q             dU += dN^T Q             dV += A^T dO

Invariants that all kernels share:
- d_ff is one flat loop over (sub-network, block of its d_e), so that the software pipeline crosses sub-networks.
- A tile that reaches past L, d_e or d_h is filled with zeros: SiLU(0) * 0 = 0, so it adds nothing, and only stores
  need masks.
- Sums are float32, in a fixed order; there are no atomics, so repeats are bitwise equal.
- Offsets of rows are int64: tokens * d_model may pass 2^31.
- In the backward, tiles of tokens are loaded through pointers: then Triton leaves a left operand in shared memory. From
  registers it ran 1.05 to 1.17 times slower on an H200 (spills, serialised products). The forward is faster with
  registers.
- Otherwise, a tile is loaded through a TMA descriptor (which Triton turns into pointers on GPUs without TMA), or, for
  strides that a descriptor cannot express, through pointers.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Arguments that follow L or B. Were a kernel specialised on them (on 1, on multiples of 16), a new length would compile
# it anew in mid-training. The loads stay as wide, for every address has a stride or a block beside these; but for r in
# backward_weights_kernel under Triton 3.6, 4 bytes instead of 8.
_VARYING = (
    *("length", "batch", "tiles_m", "tiles_per_split", "out_rows", "splits"),
    *("r_b", "r_h", "r_e", "dr_b", "dr_h", "dr_e"),
)


@triton.jit
def _token_tile(
    x,
    b,
    start,
    head,
    length,
    stride_b,
    stride_l,
    stride_h,
    stride_d,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Load `x[b, start : start + BLOCK_M, head, :]` as `[BLOCK_M, BLOCK_D]`."""
    if DESCRIPTORS:
        tile = x.load([b, start, head, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        rows = start + tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_D)
        base = x + tl.cast(b, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
        pointers = base + rows[:, None].to(tl.int64) * stride_l + cols[None, :].to(tl.int64) * stride_d
        tile = tl.load(pointers, mask=(rows < length)[:, None] & (cols < D)[None, :], other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _weight_tile(
    w,
    head,
    e,
    start,
    d_e,
    stride_h,
    stride_e,
    stride_f,
    stride_d,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Load `w[head, e, start : start + BLOCK_N, :]` as `[BLOCK_N, BLOCK_D]`."""
    if DESCRIPTORS:
        tile = w.load([head, e, start, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        rows = start + tl.arange(0, BLOCK_N)
        cols = tl.arange(0, BLOCK_D)
        base = w + tl.cast(head, tl.int64) * stride_h + tl.cast(e, tl.int64) * stride_e
        pointers = base + rows[:, None].to(tl.int64) * stride_f + cols[None, :].to(tl.int64) * stride_d
        tile = tl.load(pointers, mask=(rows < d_e)[:, None] & (cols < D)[None, :], other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _gate_tile(r, b, start, head, e, length, stride_b, stride_l, stride_h, stride_e, BLOCK_M: tl.constexpr):
    """Load `r[b, start : start + BLOCK_M, head, e]` as float32 `[BLOCK_M]`; fastest where r has stride 1 along L."""
    rows = start + tl.arange(0, BLOCK_M)
    base = r + tl.cast(b, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h + tl.cast(e, tl.int64) * stride_e
    return tl.load(base + rows.to(tl.int64) * stride_l, mask=rows < length, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(m, GATE: tl.constexpr):
    """Return the logistic function of float32 `m`.

    GATE: `tanh`, one special-function operation, absolute error up to 2^-12; `exp`, two of them, a few units in the
    last place; `libm`, at most two units. The last one branches, and Hopper's asynchronous products must not have
    branches between them: with ptxas 12.8 their results were wrong. So it is for products in IEEE float32 only.
    """
    if GATE == "tanh":
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * m], tl.float32, is_pure=True, pack=1)
        s = 0.5 + 0.5 * t
    elif GATE == "exp":
        s = tl.sigmoid(m)
    else:
        s = tl.div_rn(1.0, 1.0 + libdevice.exp(-m))
    return s


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q, k, u, v, r, o,
    q_b, q_l, q_h, q_d,
    k_h, k_e, k_f, k_d,
    u_h, u_e, u_f, u_d,
    v_h, v_e, v_f, v_d,
    r_b, r_l, r_h, r_e,
    length, heads, group, subnetworks, d_e,
    tiles_per_split, tiles_m, out_rows,
    D: tl.constexpr,
    TILES_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `o[split, b, l, h, :]`: the sum over the tiles of d_ff that belong to this split.

    Grid `(batch * tiles_m * heads, splits)`, tokens fastest, so that the programs that run together share a head's
    K, U, V in L2. With one split, o is the output; with more, o is a float32 workspace.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    start = (pid % tiles_m) * BLOCK_M
    b = (pid // tiles_m) % (tl.num_programs(0) // (tiles_m * heads))
    head = pid // (tl.num_programs(0) // heads)
    kuv = head // group

    q_tile = _token_tile(q, b, start, head, length, q_b, q_l, q_h, q_d, D, BLOCK_M, BLOCK_D, DESCRIPTORS, INTERPRETED)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = split * tiles_per_split
    for tile in range(first, min(first + tiles_per_split, subnetworks * TILES_E)):
        e = tile // TILES_E
        col = (tile % TILES_E) * BLOCK_N
        k_tile = _weight_tile(k, kuv, e, col, d_e, k_h, k_e, k_f, k_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
        u_tile = _weight_tile(u, kuv, e, col, d_e, u_h, u_e, u_f, u_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
        v_tile = _weight_tile(v, kuv, e, col, d_e, v_h, v_e, v_f, v_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
        gate = _gate_tile(r, b, start, head, e, length, r_b, r_l, r_h, r_e, BLOCK_M)
        m = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        n = tl.dot(q_tile, tl.trans(u_tile), input_precision=PRECISION)
        a = m * _sigmoid(m, GATE) * n * gate[:, None]
        acc = tl.dot(a.to(q_tile.dtype), v_tile, acc, input_precision=PRECISION)

    rows = start + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    row = (split.to(tl.int64) * out_rows + tl.cast(b, tl.int64) * length + rows) * heads + head
    tl.store(
        o + row[:, None] * D + cols[None, :],
        acc.to(o.dtype.element_ty),
        mask=(rows < length)[:, None] & (cols < D)[None, :],
    )


@triton.jit(do_not_specialize=_VARYING)
def backward_tokens_kernel(
    grad_o, q, k, u, v, r, dq, dr,
    g_b, g_l, g_h, g_d,
    q_b, q_l, q_h, q_d,
    k_h, k_e, k_f, k_d,
    u_h, u_e, u_f, u_d,
    v_h, v_e, v_f, v_d,
    r_b, r_l, r_h, r_e,
    dr_b, dr_l, dr_h, dr_e,
    length, heads, group, subnetworks, d_e, tiles_m,
    D: tl.constexpr,
    TILES_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_R: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dQ and dR of a tile of tokens. Grid `(batch * tiles_m * heads,)`, tokens fastest."""
    pid = tl.program_id(0)
    start = (pid % tiles_m) * BLOCK_M
    b = (pid // tiles_m) % (tl.num_programs(0) // (tiles_m * heads))
    head = pid // (tl.num_programs(0) // heads)
    kuv = head // group

    q_tile = _token_tile(q, b, start, head, length, q_b, q_l, q_h, q_d, D, BLOCK_M, BLOCK_D, False, INTERPRETED)
    g_tile = _token_tile(grad_o, b, start, head, length, g_b, g_l, g_h, g_d, D, BLOCK_M, BLOCK_D, False, INTERPRETED)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    gate_sum = tl.zeros([BLOCK_M], tl.float32)
    rows = start + tl.arange(0, BLOCK_M)
    for tile in range(0, subnetworks * TILES_E):
        e = tile // TILES_E
        col = (tile % TILES_E) * BLOCK_N
        k_tile = _weight_tile(k, kuv, e, col, d_e, k_h, k_e, k_f, k_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
        u_tile = _weight_tile(u, kuv, e, col, d_e, u_h, u_e, u_f, u_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
        v_tile = _weight_tile(v, kuv, e, col, d_e, v_h, v_e, v_f, v_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
        gate = _gate_tile(r, b, start, head, e, length, r_b, r_l, r_h, r_e, BLOCK_M)
        m = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        n = tl.dot(q_tile, tl.trans(u_tile), input_precision=PRECISION)
        d = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        s = _sigmoid(m, GATE)
        g = m * s
        if NEED_R:
            gate_sum += tl.sum(d * g * n, 1)
            if tile % TILES_E == TILES_E - 1:
                base = dr + tl.cast(b, tl.int64) * dr_b + tl.cast(head, tl.int64) * dr_h + tl.cast(e, tl.int64) * dr_e
                tl.store(base + rows.to(tl.int64) * dr_l, gate_sum.to(dr.dtype.element_ty), mask=rows < length)
                gate_sum = tl.zeros([BLOCK_M], tl.float32)
        if NEED_Q:
            d = d * gate[:, None]
            dn = d * g
            dm = d * n * (s + g * (1.0 - s))
            acc = tl.dot(dm.to(q_tile.dtype), k_tile, acc, input_precision=PRECISION)
            acc = tl.dot(dn.to(q_tile.dtype), u_tile, acc, input_precision=PRECISION)

    if NEED_Q:
        cols = tl.arange(0, BLOCK_D)
        row = (tl.cast(b, tl.int64) * length + rows) * heads + head
        tl.store(
            dq + row[:, None] * D + cols[None, :],
            acc.to(dq.dtype.element_ty),
            mask=(rows < length)[:, None] & (cols < D)[None, :],
        )


@triton.jit
def _place(tile, kuv, batch, group, sequences, tiles_m, BLOCK_M: tl.constexpr):
    """Return the sequence, the query head and the first token of a tile; the tiles of one head follow each other."""
    if sequences == 1:
        b = tile * 0
        head = kuv
        start = tile * BLOCK_M
    else:
        sequence = tile // tiles_m
        b = sequence % batch
        head = kuv * group + sequence // batch
        start = (tile % tiles_m) * BLOCK_M
    return b, head, start


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=("sequences",))
def backward_weights_kernel(
    grad_o, q, k, u, v, r, dk, du, dv,
    g_b, g_l, g_h, g_d,
    q_b, q_l, q_h, q_d,
    k_h, k_e, k_f, k_d,
    u_h, u_e, u_f, u_d,
    v_h, v_e, v_f, v_d,
    r_b, r_l, r_h, r_e,
    batch, length, group, subnetworks, d_e,
    tiles_m, sequences, tiles_per_split, out_rows,
    D: tl.constexpr,
    TILES_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEED_K: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_V: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `d*[split, h, e, f, :]`: the sums over the tiles of tokens that belong to this split.

    Grid `(kuv heads * sub-networks * TILES_E, splits)`. `sequences` is batch * group: the query heads of one K/U/V head
    are so many more sequences to sum over. TRANSPOSED computes the scores as `[BLOCK_N, BLOCK_M]`, so that they are the
    left operand of the sums as they come.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    col = (pid % TILES_E) * BLOCK_N
    e = (pid // TILES_E) % subnetworks
    kuv = pid // (TILES_E * subnetworks)

    k_tile = _weight_tile(k, kuv, e, col, d_e, k_h, k_e, k_f, k_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
    u_tile = _weight_tile(u, kuv, e, col, d_e, u_h, u_e, u_f, u_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
    v_tile = _weight_tile(v, kuv, e, col, d_e, v_h, v_e, v_f, v_d, D, BLOCK_N, BLOCK_D, DESCRIPTORS, INTERPRETED)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    du_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = split * tiles_per_split
    for tile in range(first, min(first + tiles_per_split, sequences * tiles_m)):
        b, head, start = _place(tile, kuv, batch, group, sequences, tiles_m, BLOCK_M)
        q_tile = _token_tile(q, b, start, head, length, q_b, q_l, q_h, q_d, D, BLOCK_M, BLOCK_D, False, INTERPRETED)
        g_tile = _token_tile(
            grad_o, b, start, head, length, g_b, g_l, g_h, g_d, D, BLOCK_M, BLOCK_D, False, INTERPRETED
        )
        gate = _gate_tile(r, b, start, head, e, length, r_b, r_l, r_h, r_e, BLOCK_M)
        if TRANSPOSED:
            gate = gate[None, :]
            m = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            n = tl.dot(u_tile, tl.trans(q_tile), input_precision=PRECISION)
            d = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        else:
            gate = gate[:, None]
            m = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            n = tl.dot(q_tile, tl.trans(u_tile), input_precision=PRECISION)
            d = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        s = _sigmoid(m, GATE)
        g = m * s
        d = d * gate
        if NEED_V:
            a = (g * n * gate).to(q_tile.dtype)
            dv_acc = tl.dot(a if TRANSPOSED else tl.trans(a), g_tile, dv_acc, input_precision=PRECISION)
        if NEED_U:
            dn = (d * g).to(q_tile.dtype)
            du_acc = tl.dot(dn if TRANSPOSED else tl.trans(dn), q_tile, du_acc, input_precision=PRECISION)
        if NEED_K:
            dm = (d * n * (s + g * (1.0 - s))).to(q_tile.dtype)
            dk_acc = tl.dot(dm if TRANSPOSED else tl.trans(dm), q_tile, dk_acc, input_precision=PRECISION)

    rows = col + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    row = split.to(tl.int64) * out_rows + (kuv * subnetworks + e).to(tl.int64) * d_e + rows
    offsets = row[:, None] * D + cols[None, :]
    mask = (rows < d_e)[:, None] & (cols < D)[None, :]
    if NEED_K:
        tl.store(dk + offsets, dk_acc.to(dk.dtype.element_ty), mask=mask)
    if NEED_U:
        tl.store(du + offsets, du_acc.to(du.dtype.element_ty), mask=mask)
    if NEED_V:
        tl.store(dv + offsets, dv_acc.to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def sum_splits_kernel(partials, out, numel, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write `out = partials.sum(0)`, partials `[splits, numel]` float32; SPLITS is the power of two from splits on."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    pointers = partials + split[:, None].to(tl.int64) * numel + offsets[None, :]
    values = tl.load(pointers, mask=(split < splits)[:, None] & (offsets < numel)[None, :], other=0.0)
    tl.store(out + offsets, tl.sum(values, 0).to(out.dtype.element_ty), mask=offsets < numel)
