"""Launches kernels with little work for the host. May import torch and triton.

`kernel[grid](...)` finds the compiled code by binding the arguments and writing out, as a string, all that the code may
be specialised for. That takes longer than a small layer runs. `launch` finds it by the same facts, read directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

INT32 = 2**31


def cdiv(a: int, b: int) -> int:
    """Return `a / b`, rounded up; `triton.cdiv`, which kernels may call too, costs the host a hundred times as much."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n, which is positive."""
    return 1 << (n - 1).bit_length()


# What was compiled, and the constants behind its arguments, by kernel, device, constants and facts of the arguments.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Do `kernel[grid](*args, **constants)` on the device of the tensors, whichever is current.

    Args:
        kernel: at module level: it is known by its address.
        grid: programs, in one to three dimensions.
        device: of the tensors.
        *args: all arguments that are no constants: tensors, TMA descriptors, integers or None.
        **constants: `tl.constexpr` arguments, and options such as `num_warps`.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, device, *args, **constants)
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*args, **constants)
        return None
    facts = (id(kernel), device.index, *constants.items(), *[_fact(x) for x in args])
    found = _compiled.get(facts)
    if found is None:
        code = kernel[grid](*args, **constants)
        _compiled[facts] = code, [constants[name] for name in kernel.arg_names[len(args) :]]
    else:
        code, behind = found
        code[(*grid, 1, 1)[:3]](*args, *behind)
    return None


def _fact(x: Any) -> Any:
    """Return what code may be specialised for: whether an integer is 1 or a multiple of 16, and its width; dtypes."""
    if type(x) is int:
        return (2 if x == 1 else x % 16 == 0) if x < INT32 else 4 + (x % 16 == 0)
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return type(x), x.base.dtype, tuple(x.block_shape)  # a descriptor; its layout is the same wherever its block is
