"""What does racecheck follow? A ring of buffers as those of the Gluon kernels, `right` or `wrong`; on Hopper.

    compute-sanitizer --tool racecheck python3 tests/gpu/racecheck_control.py right    # and once more with `wrong`

One warp copies tiles into the ring by TMA, four others add them up. `right` waits for a buffer's readers before it is
filled again, by the barrier `empty`, as the kernels do; `wrong` does not. (A barrier `full` for each tile, not for each
buffer as there: else the reader of `wrong`, twice overtaken, would wait for ever.) A tool that follows such barriers
reports hazards in `wrong` alone. Any other result says nothing of the kernels.
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS, COLUMNS, COUNT, DEPTH = 64, 64, 32, 2


@gluon.jit
def _consumer(buffers, full, empty, out, TILES: gl.constexpr):
    STAGES: gl.constexpr = buffers.shape[0]
    ROWS: gl.constexpr = buffers.shape[1]
    COLUMNS: gl.constexpr = buffers.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    for i in range(TILES):
        stage = i % STAGES
        mbarrier.wait(full.index(i), 0)
        acc += buffers.index(stage).load(layout).to(gl.float32)
        mbarrier.arrive(empty.index(stage), count=1)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * COLUMNS + cols[None, :], acc)


@gluon.jit
def _producer(buffers, full, empty, x, TILES: gl.constexpr, WAITS: gl.constexpr):
    STAGES: gl.constexpr = buffers.shape[0]
    ROWS: gl.constexpr = buffers.shape[1]
    COLUMNS: gl.constexpr = buffers.shape[2]
    for i in range(TILES):
        stage = i % STAGES
        if WAITS:
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(i), ROWS * COLUMNS * 2)
        tma.async_copy_global_to_shared(x, [i * ROWS, 0], full.index(i), buffers.index(stage))


@gluon.jit
def ring_kernel(x, out, TILES: gl.constexpr, STAGES: gl.constexpr, WAITS: gl.constexpr):
    """Write into out the sum of the tiles of x."""
    ROWS: gl.constexpr = x.block_type.shape[0]
    COLUMNS: gl.constexpr = x.block_type.shape[1]
    buffers = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, COLUMNS], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(TILES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [(_consumer, (buffers, full, empty, out, TILES)), (_producer, (buffers, full, empty, x, TILES, WAITS))],
        [1],
        [24],
    )


def main() -> None:
    """Run it once; the sum of `right` is checked, that of `wrong` may be anything."""
    kind = sys.argv[1]
    assert kind in ("right", "wrong"), kind
    x = torch.randint(-4, 5, (COUNT * ROWS, COLUMNS), device="cuda").bfloat16()
    out = torch.full((ROWS, COLUMNS), float("nan"), device="cuda")
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles = TensorDescriptor(x, list(x.shape), [COLUMNS, 1], [ROWS, COLUMNS], layout)
    ring_kernel[(1,)](tiles, out, COUNT, DEPTH, kind == "right", num_warps=4)
    exact = torch.equal(out, x.view(COUNT, ROWS, COLUMNS).float().sum(0))
    print(kind, "exact" if exact else "another sum", flush=True)
    assert exact or kind == "wrong"


if __name__ == "__main__":
    main()
