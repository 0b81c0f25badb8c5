"""The Gluon kernels without a GPU: they compile for Hopper and fit its memory, and the cut into waves adds up."""

from __future__ import annotations

import os

import pytest
import torch
import triton
from mhf_kernels import gluon_backend, gluon_kernels, gluon_weights
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

SHARED_MEMORY = 227 * 1024
KINDS = {"q": "tokens", "grad_o": "tokens", "o": "tokens", "dq": "tokens", "w": "router"}
KINDS |= dict.fromkeys("kuv", "weights")


def compiled(function, constants, blocks, dtype):
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in KINDS:
            rows, columns = blocks[KINDS[name]]
            signature[name] = f"tensordesc<{dtype}[{rows}, {columns}],{gluon_backend.SWIZZLED!r}>"
        else:
            signature[name] = "*fp32" if name in ("r", "dr", "dk", "du", "dv", "partials") else "i32"
    divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n][0] == "*"}
    source = GluonASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


CASES = {
    **{f"forward-{d_h}": (gluon_kernels.forward_kernel, d_h, rings) for d_h, rings in gluon_backend.FORWARD.items()},
    **{
        f"routed-{d_h}": (gluon_kernels.forward_kernel, d_h, gluon_backend.FORWARD[d_h])
        for d_h in gluon_backend.ROUTED_D_H
    },
    **{
        f"tokens-{d_h}": (gluon_kernels.backward_tokens_kernel, d_h, rings)
        for d_h, rings in gluon_backend.BACKWARD_TOKENS.items()
    },
    **{
        f"weights-{d_h}-{number}": (gluon_weights.backward_weights_kernel, d_h, needed)
        for d_h, rings in gluon_backend.BACKWARD_WEIGHTS.items()
        for number, needed in enumerate(rings.together)
    },
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compile_for_hopper_and_fit(case):
    kernel, d_h, rings = CASES[case]
    if isinstance(rings, tuple):
        needed, rings = rings, gluon_backend.BACKWARD_WEIGHTS[d_h]
        constants = {"D": d_h, "Q_STAGES": rings.q, "G_STAGES": rings.grad_o}
        constants |= dict(zip(("NEED_K", "NEED_U", "NEED_V"), needed, strict=True))
        blocks = {"tokens": (rings.tokens, rings.columns), "weights": (64, rings.columns)}
    else:
        constants = {"D": d_h, "BLOCK_N": rings.block_n, "TILES_E": 2, "KU_STAGES": rings.ku, "V_STAGES": rings.v}
        constants["PARTIAL"] = d_h == 128
        blocks = {"tokens": (64, d_h), "weights": (rings.block_n, d_h), "router": (gluon_backend.BLOCK_E, d_h)}
    if kernel is gluon_kernels.forward_kernel:
        routed = case.startswith("routed")
        constants |= {"E": 22, "r": None} if routed else {"E": 0, "w": None}
    dtype = "fp16" if d_h == 64 else "bf16"
    binary = compiled(kernel, {**constants, "FAST": d_h != 256}, blocks, dtype)
    assert 0 < binary.metadata.shared <= SHARED_MEMORY
    assert binary.asm["cubin"]


@pytest.mark.parametrize("programs", [1, 66, 67, 131, 132, 133, 4096, 8192])
@pytest.mark.parametrize("subnetworks", [1, 3, 22])
def test_waves_and_rest_make_all_programs_and_subnetworks(monkeypatch, programs, subnetworks):
    monkeypatch.setattr(gluon_backend, "multiprocessors", lambda device: 132)
    parts = gluon_backend._parts(programs, subnetworks, torch.device("cpu"))
    assert [part.first for part in parts] == [0, parts[0].programs][: len(parts)]
    assert sum(part.programs for part in parts) == programs
    for part in parts:
        assert (part.splits - 1) * part.share < subnetworks <= part.splits * part.share
    if len(parts) == 2:
        assert parts[0].programs % 132 == 0
        assert parts[0].splits == 1 < parts[1].splits
        assert parts[1].programs * parts[1].splits <= 132


@pytest.mark.parametrize(("programs", "splits", "waves"), [(352, 3, 2 + 2 / 3), (1408, 3, 10 + 2 / 3), (96, 4, 3 / 4)])
@pytest.mark.parametrize("tiles", [2, 5, 240])
def test_the_rest_of_dk_du_dv_ends_soonest(monkeypatch, programs, splits, waves, tiles):
    monkeypatch.setattr(gluon_backend, "multiprocessors", lambda device: 132)
    parts = gluon_backend._weight_parts(programs, tiles, torch.device("cpu"))
    assert [part.first for part in parts] == [0, parts[0].programs][: len(parts)]
    assert sum(part.programs for part in parts) == programs
    assert all((part.splits - 1) * part.share < tiles <= part.splits * part.share for part in parts)
    if tiles == 240:
        assert parts[-1].splits == splits
        lasts = sum(-(-part.programs * part.splits // 132) * part.share for part in parts)
        assert lasts == pytest.approx(waves * tiles)
    assert gluon_backend._weight_parts(264, tiles, torch.device("cpu")) == [gluon_backend.Part(0, 264, 1, tiles)]
    assert gluon_backend._weight_parts(131, tiles, torch.device("cpu")) == [gluon_backend.Part(0, 131, 1, tiles)]


def test_what_tma_can_read():
    q = torch.empty(2, 10, 4, 64, dtype=torch.bfloat16)
    assert gluon_backend._is_matrix(q)
    assert gluon_backend._is_matrix(q[:1, ::2])  # every other token
    assert not gluon_backend._is_matrix(q[:, :1].expand(2, 10, 4, 64))  # one token for all, as the gradient of a sum
    assert not gluon_backend._is_matrix(q.transpose(1, 2).contiguous().transpose(1, 2))
    assert gluon_backend._is_matrix(q[:, :, :2])  # some of the heads
    assert not gluon_backend._is_matrix(q[..., :32])


def test_a_wrong_setting_is_not_taken_for_a_compiler_that_fails(monkeypatch):
    monkeypatch.setattr(gluon_backend, "_failure", [])
    monkeypatch.setenv("MHF_GATE", "Exact")
    with pytest.raises(ValueError, match="MHF_GATE=Exact"):
        gluon_backend._or_triton(lambda: "fast", lambda: "portable")
    assert not gluon_backend._failure


def test_running_out_of_memory_is_not_taken_for_a_compiler_that_fails(monkeypatch):
    def launch():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gluon_backend, "_failure", [])
    with pytest.raises(torch.OutOfMemoryError):
        gluon_backend._or_triton(launch, lambda: "portable")
    assert not gluon_backend._failure
    assert gluon_backend._or_triton(launch, lambda: "portable", wanted=False) == "portable"
