"""`python -m mhf_kernels.info`: which backend the op would use here, and why. May import torch and its siblings.

Asks the dispatcher and the backends with small empty tensors; runs no kernel.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys

import torch
from torch import Tensor

from mhf_kernels import dispatch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_WIDTHS = (64, 96, 128, 256)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def main() -> int:
    """Print the report; returns 1 where `MHF_BACKEND` asks for what is not available here, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"python {platform.python_version()}, torch {torch.__version__}, triton {_triton_version()}")
    print(f"device: {_describe(device)}")
    wanted = os.environ.get("MHF_BACKEND")
    print(f"MHF_BACKEND: {wanted or 'auto (unset)'}; auto takes the first that can: {', '.join(dispatch.BACKENDS)}")

    print("\nbackends (bfloat16, d_h 128)")
    for name in dispatch.NAMES:
        print(f"  {name:10} {dispatch.why_not(name, *probe(device, torch.bfloat16, 128)) or 'available'}")

    print("\nwould be used   " + "".join(f"{_name(dtype):12}" for dtype in DTYPES))
    problems: dict[str, None] = {}
    for d_h in HEAD_WIDTHS:
        picks = []
        for dtype in DTYPES:
            try:
                picks.append(dispatch.select(*probe(device, dtype, d_h)).name)
            except dispatch.BackendUnavailableError as error:
                picks.append("none")
                problems[str(error)] = None
        print(f"  d_h {d_h:<10}" + "".join(f"{pick:12}" for pick in picks))
    for problem in problems:
        print(f"none: {problem}")

    if device.type == "cuda" and dispatch.why_not("triton", *probe(device, torch.bfloat16, 128)) is None:
        _print_tuning(device)
    return 1 if problems else 0


def probe(device: torch.device, dtype: torch.dtype, d_h: int) -> Inputs:
    """Return q, k, u, v, r of a small layer and of tokens that fill a GPU, uninitialised."""
    tokens = 32_768
    k, u, v = (torch.empty(1, 1, 64, d_h, device=device, dtype=dtype) for _ in range(3))
    r_dtype = torch.promote_types(dtype, torch.float32)
    q, r = (
        torch.empty(1, tokens, 1, d_h, device=device, dtype=dtype),
        torch.empty(1, tokens, 1, 1, device=device, dtype=r_dtype),
    )
    return q, k, u, v, r


def _print_tuning(device: torch.device) -> None:
    """Show the tile of every Triton kernel, and whether the shipped table or the default gave it."""
    from mhf_kernels import tuning

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    print(f"\ntiles of the triton kernels on {arch} (tuned: from {tuning.TABLE.name}; default: safe on every GPU)")
    for kernel in tuning.KERNELS:
        for dtype in ("half", "float32"):
            tile, source = tuning.lookup(kernel, arch, 128, dtype)
            print(f"  {kernel:18}{dtype:9}d_h 128   {source:9}{tile}")


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({platform.machine()}); torch sees no CUDA device"
    capability = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
    return f"{torch.cuda.get_device_name(device)}, compute capability {capability}, CUDA {torch.version.cuda}"


def _triton_version() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError as error:
        return f"not importable ({error})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
