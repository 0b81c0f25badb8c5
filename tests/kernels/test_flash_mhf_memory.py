"""What the op keeps and what it holds: never anything of size tokens x heads x d_ff."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from mhf_kernels import FlashMHF, blocked, flash_mhf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward, the parameters' own storage left out."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    assert out.requires_grad
    return sum(storages.values())


def test_saved_bytes_do_not_grow_with_d_ff():
    x = torch.randn(2, 64, 32)
    small, large = (saved_bytes(FlashMHF(32, 4, 2, d_e), x) for d_e in (16, 1024))
    assert 0 < small == large


def test_the_op_saves_its_inputs_and_nothing_else(make_inputs):
    inputs = make_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        flash_mhf(*inputs)
    assert saved == [x.data_ptr() for x in inputs]


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operation_returns_more_than_a_block(make_inputs, dtype):
    tokens, heads, d_h, subnetworks, d_e = 2048, 4, 16, 4, 320
    q, k, u, v, r = make_inputs(1, tokens, heads, d_h, subnetworks, d_e, dtype=dtype, requires_grad=False)
    bound = max(blocked.BLOCK_ELEMENTS["cpu"], q.numel(), k.numel(), r.numel())
    assert tokens * heads * subnetworks * d_e > 8 * bound
    with LargestTensor() as largest:
        blocked.forward(q, k, u, v, r)
    assert 0 < largest.elements <= bound
    with LargestTensor() as largest:
        blocked.backward(q, q, k, u, v, r, (True,) * 5)
    assert 0 < largest.elements <= bound


PEAK = """
import resource, torch
torch.set_num_threads(1)
from mhf_kernels import flash_mhf

def run(tokens):
    q = torch.randn(1, tokens, 4, 32, requires_grad=True)
    k, u, v = (torch.randn(4, 8, 256, 32, requires_grad=True) for _ in range(3))
    flash_mhf(q, k, u, v, torch.rand(1, tokens, 4, 8, requires_grad=True)).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = run(1024)
print(run(8192) - small)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_resident_memory_of_forward_and_backward():
    printed = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True).stdout
    one_intermediate = 8192 * 4 * (8 * 256) * 4  # bytes of one [T, H, d_ff] in float32: 256 MiB
    assert int(printed) < one_intermediate / 4
