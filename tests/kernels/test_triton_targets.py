"""The Triton kernels compile for every NVIDIA architecture from Ampere on, and their tiles fit its shared memory."""

from __future__ import annotations

import os

import pytest
import torch
import triton
from mhf_kernels import triton_backend, triton_kernels, triton_router, tuning
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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
FLOAT32 = {"r", "dr"}


def family(dtype: str) -> str:
    return "float32" if DTYPES[dtype] == torch.float32 else "half"


def default(kernel: str, d_h: int, dtype: str) -> tuning.Tile:
    return tuning.default(kernel, triton.next_power_of_2(d_h), family(dtype))


def compiled(kernel: str, arch: int, d_h: int, dtype: str = "bf16", tile: tuning.Tile | None = None, descriptors=True):
    """Compile as the backend launches it: K, U, V (and the forward's Q) by descriptor, r with stride 1 along L.

    `fp32` multiplies in IEEE float32, `tf32` in TF32; the tile is the default, if none is given.
    """
    function = KERNELS[kernel]
    tile = tile or default(kernel, d_h, dtype)
    block_d = triton.next_power_of_2(d_h)
    element = "fp32" if dtype == "tf32" else dtype
    constants = {
        "D": d_h,
        "TILES_E": 4,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "DESCRIPTORS": descriptors,
        "GATE": triton_backend._gate(DTYPES[dtype], tf32=dtype == "tf32"),
        "INTERPRETED": False,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "TRANSPOSED": tile.transposed,
        **{f"NEED_{x}": True for x in "QKUVR"},
        **{f"{x}_d": 1 for x in "qgkuv"},
        **{"r_l": 1, "dr_l": 1},
    }
    described = {"k": [1, 1, tile.block_n, block_d]}
    described["u"] = described["v"] = described["k"]
    if function is triton_kernels.forward_kernel:
        described["q"] = [1, tile.block_m, 1, block_d]
    signature, values, divisible = {}, {}, {}
    for param in function.params:
        name = param.name
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
            continue
        if name in described and descriptors:
            signature[name] = f"tensordesc<{element}{described[name]}>"
        elif name in ("q", "k", "u", "v", "o", "grad_o", "dq", "dk", "du", "dv"):
            signature[name] = f"*{element}"
        else:
            signature[name] = "*fp32" if name in FLOAT32 else "i32"
        if signature[name][0] in "*i" and not param.do_not_specialize:
            divisible[(param.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=divisible)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check_it_fits(binary, arch: int) -> None:
    assert 0 < binary.metadata.shared <= SHARED_MEMORY[arch] * 1024
    assert binary.asm["cubin"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_default_tile_compiles_and_fits(kernel, arch):
    check_it_fits(compiled(kernel, arch, 128), arch)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("d_h", [16, 96, 256])
def test_other_head_widths(kernel, d_h):
    check_it_fits(compiled(kernel, 86, d_h), 86)


@pytest.mark.parametrize("kernel", KERNELS)
def test_through_pointers(kernel):
    check_it_fits(compiled(kernel, 80, 64, descriptors=False), 86)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "d_h"), [("fp16", 128), ("fp32", 64), ("fp32", 256), ("tf32", 64), ("tf32", 128)])
def test_other_dtypes(kernel, dtype, d_h):
    check_it_fits(compiled(kernel, 86, d_h, dtype), 86)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", [80, 120])
def test_tf32_of_wide_heads_where_it_is_used(kernel, arch):
    assert f"sm_{arch}" not in triton_backend.NARROW
    check_it_fits(compiled(kernel, arch, 256, "tf32"), arch)


@pytest.mark.parametrize("tokens", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_h", [128, 256])
@pytest.mark.parametrize("arch", [86, 90])
def test_decoding_up_to_64_tokens(arch, d_h, dtype, tokens):
    """The tile that decoding takes, which may be larger than that of the table: 90 has a row in it, 86 none."""
    tile, source = tuning.lookup("decode", f"sm_{arch}", d_h, family(dtype))
    assert source == ("tuned" if arch == 90 else "default")
    tile = triton_backend.decode_tile(tile, torch.empty(1, tokens, 1, d_h, dtype=DTYPES[dtype]))
    check_it_fits(compiled("decode", arch, d_h, dtype, tile), arch)


@pytest.mark.parametrize(
    "kernel", [triton_router._forward_kernel, triton_router._backward_kernel], ids=["forward", "backward"]
)
@pytest.mark.parametrize(
    ("arch", "d_h", "subnetworks", "dtype"),
    [(80, 128, 11, "bf16"), (86, 256, 32, "bf16"), (90, 96, 22, "fp16"), (86, 256, 16, "fp32"), (120, 64, 16, "bf16")],
)
def test_the_gate_compiles_and_fits(kernel, arch, d_h, subnetworks, dtype):
    q = torch.empty(1, 1, 1, d_h, dtype=DTYPES[dtype])
    constants = triton_router._constants(q, torch.empty(1, d_h, subnetworks)) | {
        "q_d": 1,
        "r_l": 1,
        "g_l": 1,
        "NEED_Q": True,
    }
    signature, values = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in ("q", "dq"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*fp32" if name in ("w", "r", "grad_r", "partials") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    options = {"num_stages": constants["num_stages"]}
    check_it_fits(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), arch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tuning.read(tuning.TABLE) if "/sm_90/" in name])
def test_every_tuned_tile_fits(name):
    kernel, _, d_h, dtypes = name.split("/")
    for dtype in ("bf16", "fp16") if dtypes == "half" else ("fp32", "tf32"):
        check_it_fits(compiled(kernel, 90, int(d_h), dtype, tuning.read(tuning.TABLE)[name]), 90)
