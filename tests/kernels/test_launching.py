"""`launch` runs the code that Triton itself would pick. A driver without a GPU records what would reach CUDA."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl
from mhf_kernels import gluon_backend, launching, triton_backend, triton_router
from mhf_kernels.launching import launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
CPU = torch.device("cpu")


@triton.jit
def copy_kernel(x, y, z, n, stride, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets * stride, mask=offsets < n)
    if z is not None:
        value += tl.load(z + offsets, mask=offsets < n)
    tl.store(y + offsets, 2 * value if TWICE else value, mask=offsets < n)


@triton.jit
def copy_tile_kernel(x, y, n):
    ROWS: tl.constexpr = x.block_shape[0]
    rows = tl.arange(0, ROWS)
    tl.store(y + rows[:, None] * n + rows[None, :], x.load([n, 0]).to(tl.float32))


class Recorder:
    """Stands where the launcher of CUDA does: what is launched, by which function, goes to `launched`."""

    launched: ClassVar[list[tuple[Any, ...]]] = []
    functions = itertools.count(1)

    def __init__(self, src: Any, metadata: Any) -> None:
        self.src = src

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        self.launched.append((x, y, z, function, *args[4:]))


class Driver:
    """Hopper, without one."""

    launcher_cls = Recorder

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, next(Recorder.functions), 32, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """What reached CUDA: grid, function, arguments."""
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(Recorder, "launched", [])
    return Recorder.launched


def check(launched, kernel, grid, *args, **constants):
    """Launch by Triton and by `launch`; both must do the same."""
    launched.clear()
    kernel[grid](*args, **constants)
    launch(kernel, grid, CPU, *args, **constants)
    by_triton, ours = launched
    assert all(a is b or a == b for a, b in zip(by_triton, ours, strict=True)), (by_triton, ours)
    return ours[3]


def test_the_code_is_that_of_triton(launched):
    """For tensors, None and integers of every kind that Triton may specialise for, in random order."""
    memory = {dtype: torch.zeros(80, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    random.seed(0)
    choices = [
        [memory[dtype][start : start + 64] for dtype in memory for start in (0, 1)],  # x: aligned to 16 bytes or not
        [memory[torch.float32]],
        [None, memory[torch.float32]],
        [1, 15, 16, 32, 2**31 - 1, 2**31, 2**31 + 1],
        [0, 1, 2, 16],
    ]
    functions = set()
    for _ in range(150):
        args = [random.choice(options) for options in choices]
        functions.add(check(launched, copy_kernel, (3,), *args, BLOCK=16, TWICE=random.random() < 0.2))
    assert 20 < len(functions) <= len(launching._compiled) < 120  # some were kept for others


def test_descriptors_are_told_apart(launched):
    y = torch.zeros(64, 64)
    functions = {
        check(launched, copy_tile_kernel, grid, TensorDescriptor(x, [64, 64], [64, 1], [block, block]), y, 64)
        for x in (torch.zeros(64, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
        for block in (16, 32)
        for grid in ((2, 3), (2, 3, 4))
    }
    assert len(functions) == len(launching._compiled) == 4


def test_options_are_told_apart(launched):
    x = torch.zeros(64)
    constants = {"BLOCK": 16, "TWICE": False}
    functions = {check(launched, copy_kernel, (1,), x, x, None, 64, 1, **constants, num_warps=n) for n in (1, 4)}
    assert len(functions) == 2


def test_what_does_not_compile_is_tried_again(launched):
    x = torch.zeros(64)
    for _ in range(2):
        with pytest.raises(triton.CompilationError):
            launch(copy_kernel, (1,), CPU, x, x, None, 64, 1, BLOCK=17, TWICE=False)
    assert not launching._compiled
    assert not launched


def told(x):
    """What of an argument both launches must agree on, where each has tensors of its own."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.stride()
    if hasattr(x, "base"):
        return told(x.base), x.shape, x.strides, x.block_shape
    return x


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels would keep what was made for this driver")
@pytest.mark.parametrize(("backend", "d_h"), [(gluon_backend, 64), (gluon_backend, 256), (triton_backend, 32)])
def test_a_second_call_launches_what_the_first_did(launched, monkeypatch, backend, d_h):
    """The first goes through Triton, kernel by kernel; shared tiles and sums of splits are among them."""
    for module in (gluon_backend, triton_backend):
        monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    q, grad = torch.zeros(2, 2, 300, 4, d_h, dtype=torch.bfloat16)
    k, u, v = torch.zeros(3, 4, 7, 64, d_h, dtype=torch.bfloat16)
    router = torch.zeros(4, d_h, 7)
    calls = []
    for _ in range(2):
        launched.clear()
        r = triton_router.forward(q, router)
        if backend is gluon_backend and d_h in gluon_backend.ROUTED_D_H:
            assert backend.routed_forward(q, k, u, v, router) is not None
        backend.forward(q, k, u, v, r)
        dq, *_, dr = backend.backward(grad, q, k, u, v, r, (True,) * 5)
        triton_router.backward(dr, q, router, dq)
        calls.append([[told(x) for x in launch] for launch in launched])
    assert not gluon_backend._failure
    assert calls[0] == calls[1]
    assert len(calls[0]) > len(launching._compiled) > 6
