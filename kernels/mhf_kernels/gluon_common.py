"""How the Gluon kernels are built, their invariants, and the device code that they share. May import triton only.

A program has one producer warp, which copies tiles to shared memory by TMA, and two consumer warpgroups, which multiply
(wgmma). Rings of buffers lie between them; a buffer has a barrier `full` that its copies complete, and a barrier
`empty` at which its readers arrive. Names of the mathematics are those of `triton_kernels`:

    forward    A = r G N             O += A V
    backward   dN = r D G            dM = r D N SiLU'(M)      dR += rowsum(D G N)
               dQ += dM K + dN U     dK += dM^T Q             dU += dN^T Q             dV += A^T dO

Invariants:
- d_e is a multiple of the tile of d_ff, so that the tiles of one head are consecutive rows of K, U and V.
- Tokens past the last one are filled with zeros by TMA: SiLU(0) * 0 = 0, so they add nothing, and are not stored.
- A product that is still running may read its left operand from registers. Each such operand is named in the wait for
  its product: otherwise ptxas before 13.3 may give its registers to others (triton#9433).
- There are no branches between products that run (ptxas 12.8 made wrong code of them): what must happen only for some
  tiles is predicated.
- Sums are float32, in a fixed order, without atomics: repeats are bitwise equal.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

ROWS: gl.constexpr = gl.constexpr(64)  # of a consumer warpgroup: what one wgmma has


@gluon.jit
def fast_tanh(x):
    """Return tanh of float32 `x` by the hardware, relative error up to 2^-11."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoid(m, FAST: gl.constexpr):
    """Return the logistic function of float32 `m`; FAST: by the hardware's tanh, absolute error up to 2^-12."""
    if FAST:
        t = fast_tanh(0.5 * m)
        s = 0.5 + 0.5 * t
    else:
        s = 1.0 / (1.0 + gl.exp(-m))
    return s


@gluon.jit
def opaque_zero(i):
    """Return 0, as a value that changes with the loop index `i` for all that the compiler knows.

    Added to the index of a buffer that does not change, it keeps the compiler from holding the descriptors of all such
    buffers in registers, two for each step of each product: it would spill others for them.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [i], gl.int32, is_pure=False, pack=1)


@gluon.jit
def ring(STAGES: gl.constexpr, readers: gl.constexpr, fills: gl.constexpr):
    """Return the barriers `full` and `empty` of a ring of buffers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=fills)
        mbarrier.init(empty.index(i), count=readers)
    return full, empty
