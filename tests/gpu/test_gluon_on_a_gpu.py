"""The Gluon kernels on a Hopper GPU: accuracy, exactness in many repeats, what falls back to Triton, and how."""

from __future__ import annotations

import pytest
import torch
from mhf_kernels import dispatch, flash_mhf, flash_mhf_reference, gluon_backend, triton_backend
from test_triton_on_a_gpu import HALF, NAMES, check_accuracy_rule, exact_inputs, make, values

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
REPEATS = 300


@pytest.fixture(autouse=True)
def gluon_only(monkeypatch):
    monkeypatch.setenv("MHF_BACKEND", "gluon")


@pytest.fixture(autouse=True)
def poisoned():
    """Fill every torch.empty with NaN, so that an element which no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


SHAPES = [  # batch, length, heads, kuv_heads, subnetworks, d_e, d_h; on 132 multiprocessors most have a shared rest
    (2, 1050, 8, 8, 3, 192, 128),
    (1, 2049, 8, 2, 2, 64, 128),
    (5, 1700, 2, 1, 1, 128, 128),
    (3, 700, 8, 4, 5, 128, 64),
    (1, 2433, 8, 8, 2, 192, 64),
    (1, 2100, 8, 4, 3, 128, 256),
    (2, 150, 16, 16, 3, 128, 128),  # few tokens: all of their tiles are shared
    (1, 1100, 8, 4, 6, 512, 128),  # of 192 tiles of d_ff, the last 60 are shared
    (1, 1100, 8, 4, 6, 512, 256),
]


@pytest.mark.parametrize("gate", ["fast", "exact"])
@pytest.mark.parametrize("std", [1, 6])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_rule(monkeypatch, shape, dtype, std, gate):
    monkeypatch.setenv("MHF_GATE", gate)
    check_accuracy_rule(make(shape, dtype, std))


@pytest.mark.parametrize("dtype", HALF)
def test_weight_gradients_over_65536_tokens(dtype):
    check_accuracy_rule(make((4, 16384, 2, 1, 1, 64, 128), dtype))


@pytest.mark.parametrize("gate", ["fast", "exact"])
@pytest.mark.parametrize(
    "shape", [(1, 2100, 8, 8, 4, 192, 128), (2, 1111, 8, 4, 3, 128, 64), (1, 2100, 8, 8, 2, 64, 256)]
)
def test_integers_are_exact_and_repeats_bitwise_equal(monkeypatch, shape, gate):
    """An operand that is overwritten while a product reads it would show as a wrong integer."""
    monkeypatch.setenv("MHF_GATE", gate)
    inputs, grad = exact_inputs(shape)
    expected = values(flash_mhf_reference, inputs, grad)
    half = [*(x.bfloat16() for x in inputs[:4]), inputs[4]]
    first = values(flash_mhf, half, grad)
    for name, ours, truth in zip(NAMES, first, expected, strict=True):
        assert torch.equal(ours, truth.to(ours.dtype)), name
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(values(flash_mhf, half, grad), first, strict=True))


@pytest.mark.parametrize("tokens", [16_896, 16_897, 17_024, 25_000, 33_791])
def test_waves_and_rests(tokens):
    """Whole waves, one program more, half a wave more: the same as the Triton kernels, up to rounding."""
    inputs = make((1, tokens, 1, 1, 3, 128, 128), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    ours = gluon_backend.backward(grad, *inputs, (True,) * 5)
    theirs = triton_backend.backward(grad, *inputs, (True,) * 5)
    pairs = [(gluon_backend.forward(*inputs), triton_backend.forward(*inputs)), *zip(ours, theirs, strict=True)]
    for a, b in pairs:
        assert (a.float() - b.float()).norm() <= 2e-3 * b.float().norm()


@pytest.mark.parametrize("d_h", [64, 128, 256])
def test_partial_gradients(d_h):
    inputs = make((1, 2100, 8, 8, 2, 64, d_h), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    whole = gluon_backend.backward(grad, *inputs, (True,) * 5)
    for wanted in range(5):
        part = gluon_backend.backward(grad, *inputs, tuple(i == wanted for i in range(5)))
        assert torch.equal(part[wanted], whole[wanted])
        assert [x is None for x in part] == [i != wanted for i in range(5)]


def test_what_the_kernels_do_not_take_runs_on_triton(monkeypatch):
    monkeypatch.setenv("MHF_BACKEND", "auto")
    q, k, u, v, r = make((1, 2100, 8, 8, 2, 64, 128), torch.bfloat16)
    assert dispatch.select(q, k, u, v, r).name == "gluon"
    heads_outside = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert dispatch.select(heads_outside, k, u, v, r).name == "triton"
    assert dispatch.select(q[:, :16], k, u, v, r[:, :16]).name == "triton"
    assert dispatch.select(q, *(x[:, :, :48] for x in (k, u, v)), r).name == "triton"
    one_for_all = q[:, :1].expand(q.shape)  # as the gradient of a sum over tokens
    for grad in (torch.randn_like(heads_outside), one_for_all):
        ours = gluon_backend.backward(grad, q, k, u, v, r, (True,) * 5)
        theirs = triton_backend.backward(grad, q, k, u, v, r, (True,) * 5)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_kernel_that_does_not_compile_gives_one_warning_and_the_portable_result(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise AttributeError("module 'triton' has no attribute 'new_name'")

    monkeypatch.setattr(gluon_backend, "_failure", [])
    monkeypatch.setattr(gluon_backend.gluon_kernels, "forward_kernel", Broken())
    monkeypatch.setenv("MHF_BACKEND", "auto")
    inputs = make((1, 2100, 8, 8, 2, 64, 128), torch.bfloat16)
    with pytest.warns(
        UserWarning, match="do not compile with triton .* has no attribute 'new_name'.*triton kernels run"
    ):
        first = flash_mhf(*inputs)
    assert torch.equal(first, triton_backend.forward(*inputs))
    assert dispatch.select(*inputs).name == "triton"
    assert "new_name" in dispatch.why_not("gluon", *inputs)


def test_a_cuda_graph_captures_forward_and_backward():
    inputs = make((1, 2100, 8, 8, 2, 64, 128), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    expected = values(flash_mhf, inputs, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values(flash_mhf, inputs, grad)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
