"""The Triton kernels compile for every NVIDIA architecture from Ampere on, and their default tiles fit its memory."""

from __future__ import annotations

import os

import pytest
import triton
from mhf_kernels import triton_kernels, tuning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have (CUDA's guide)
KERNELS = {
    "forward": triton_kernels.forward_kernel,
    "decode": triton_kernels.forward_kernel,
    "backward_tokens": triton_kernels.backward_tokens_kernel,
    "backward_weights": triton_kernels.backward_weights_kernel,
}
FLOAT32 = {"r", "dr"}


def compiled(kernel: str, arch: int, d_h: int, dtype: str = "bf16", descriptors: bool = True):
    """Compile as the backend launches it: the default tile, K, U, V (and the forward's Q) by descriptor."""
    function = KERNELS[kernel]
    block_d = triton.next_power_of_2(d_h)
    tile = tuning.default(kernel, block_d, "float32" if dtype == "fp32" else "half")
    constants = {
        "D": d_h,
        "TILES_E": 4,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "DESCRIPTORS": descriptors,
        "GATE": "exp" if dtype == "fp32" else "tanh",
        "INTERPRETED": False,
        "PRECISION": "ieee",
        "TRANSPOSED": tile.transposed,
        **{f"NEED_{x}": True for x in "QKUVR"},
        **{f"{x}_d": 1 for x in "qgkuv"},
    }
    described = {"k": [1, 1, tile.block_n, block_d]}
    described["u"] = described["v"] = described["k"]
    if function is triton_kernels.forward_kernel:
        described["q"] = [1, tile.block_m, 1, block_d]
    signature, values = {}, {}
    for name in function.arg_names:
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in described and descriptors:
            signature[name] = f"tensordesc<{dtype}{described[name]}>"
        elif name in ("q", "k", "u", "v", "o", "grad_o", "dq", "dk", "du", "dv"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*fp32" if name in FLOAT32 else "i32"
    divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n][0] in "*i"}
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=divisible)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_default_tile_compiles_and_fits(kernel, arch):
    binary = compiled(kernel, arch, 128)
    assert 0 < binary.metadata.shared <= SHARED_MEMORY[arch] * 1024
    assert binary.asm["cubin"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("d_h", [16, 96, 256])
def test_other_head_widths(kernel, d_h):
    assert 0 < compiled(kernel, 86, d_h).metadata.shared <= SHARED_MEMORY[86] * 1024


@pytest.mark.parametrize("kernel", KERNELS)
def test_through_pointers(kernel):
    assert compiled(kernel, 80, 64, descriptors=False).metadata.shared <= SHARED_MEMORY[86] * 1024


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("d_h", [64, 256])
def test_float32(kernel, d_h):
    assert compiled(kernel, 86, d_h, "fp32").metadata.shared <= SHARED_MEMORY[86] * 1024
