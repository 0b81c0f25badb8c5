"""The gate's kernels on a CUDA device, and the op that takes the router's weight: accuracy, repeats, graphs, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mhf_kernels import (
    blocked_router,
    dispatch,
    flash_mhf,
    flash_mhf_reference,
    gluon_backend,
    router_weights,
    triton_router,
)
from mhf_kernels.reference import router_weights_backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [  # batch, length, heads, d_h, E
    (2, 300, 4, 128, 11),
    (1, 1, 2, 128, 22),
    (3, 65, 3, 96, 16),
    (1, 4097, 2, 64, 33),
    (1, 130, 2, 256, 16),
    (1, 70_000, 2, 128, 8),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill every torch.empty with NaN, so that an element which no kernel writes is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make(shape, dtype=torch.bfloat16, scale=1.0, router_dtype=torch.float32):
    batch, length, heads, d_h, subnetworks = shape
    q = torch.randn(batch, length, heads, d_h, device="cuda").to(dtype)
    return q, (scale * d_h**-0.5 * torch.randn(heads, d_h, subnetworks, device="cuda")).to(router_dtype)


def values(gate, q, router, grad):
    """R, dQ with nothing to add to, dW."""
    dq = torch.zeros_like(q)
    dw = gate.backward(grad, q, router, dq)
    return gate.forward(q, router), dq, dw


def check(q, router):
    """Errors against float64 at most twice those of plain PyTorch, plus what 16 bits of W and dP allow.

    PyTorch sums the few products of one token in another order, so that its error is chance: float32's unit is allowed.
    """
    assert dispatch.select_router(q, router) is triton_router
    grad = torch.randn(*q.shape[:3], router.shape[2], device="cuda")
    exact = values(blocked_router, q.double(), router.double(), grad.double())
    results = zip(
        ("r", "dq", "dw"),
        values(triton_router, q, router, grad),
        values(blocked_router, q, router, grad),
        exact,
        strict=True,
    )
    unit = 2**-15 if q.dtype == torch.bfloat16 else 2**-20
    for name, ours, plain, truth in results:
        error, allowed = ours.double() - truth, plain.double() - truth
        assert (
            error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + unit * truth.square().mean().sqrt()
        ), name
        assert error.abs().max() <= 2 * allowed.abs().max() + unit * truth.abs().max(), name


@pytest.mark.parametrize("scale", [1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, scale):
    check(*make(shape, dtype, scale))


def test_a_router_in_bfloat16():
    check(*make(SHAPES[0], router_dtype=torch.bfloat16))


def test_gradients_of_a_billionth():
    """Far below what float16 can hold: dW keeps its digits."""
    q, router = make(SHAPES[0], torch.float16)
    grad = 1e-9 * torch.randn(*q.shape[:3], router.shape[2], device="cuda")
    ours, (_, truth) = triton_router.backward(grad, q, router, None), router_weights_backward(grad.double(), q, router)
    assert (ours.double() - truth).norm() < 1e-5 * truth.norm()


def op_inputs(shape, d_e=128):
    q, router = make(shape)
    k, u, v = (0.1 * torch.randn(shape[2], shape[4], d_e, shape[3], device="cuda").bfloat16() for _ in range(3))
    return [x.requires_grad_() for x in (q, k, u, v, router)]


def routed(q, k, u, v, router):
    return flash_mhf(q, k, u, v, router=router)


@pytest.mark.parametrize("backend", ["auto", "triton"])  # auto: gluon, on Hopper
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5]], ids=str)
def test_accuracy_rule_of_the_op(monkeypatch, shape, backend):
    """Maximum and RMS error against float64 at most twice those of the unfused eager path in bfloat16."""
    monkeypatch.setenv("MHF_BACKEND", backend)
    inputs = op_inputs(shape)

    def eager(q, k, u, v, router):
        m, n = (torch.einsum("blhd,hefd->blhef", q, w) for w in (k, u))
        s = torch.einsum("blhef,hefd->blhed", F.silu(m) * n, v)
        return (s * router_weights(q, router).unsqueeze(-1)).sum(dim=3).to(q.dtype)

    grad = torch.randn_like(inputs[0])

    def results(function, inputs):
        o = function(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, grad.to(o.dtype))]

    def reference(q, k, u, v, router):
        return flash_mhf_reference(q, k, u, v, router_weights(q, router))

    exact = results(reference, [x.detach().double().requires_grad_() for x in inputs])
    for name, ours, plain, truth in zip(
        ("o", "dq", "dk", "du", "dv", "dw"), results(routed, inputs), results(eager, inputs), exact, strict=True
    ):
        error, allowed = ours.double() - truth, plain.double() - truth
        assert error.abs().max() <= 2 * allowed.abs().max(), name
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt(), name


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 4352, 4, 128, 22), (3, 1500, 4, 64, 5), (1, 300, 16, 128, 5), (1, 9000, 2, 128, 1), (1, 4224, 4, 64, 32)],
    ids=str,
)
def test_the_gate_inside_the_forward(shape, dtype):
    """Against the forward with R from the gate's own kernel: the same products, with W in 16 bits twice."""
    q, router = make(shape, dtype, scale=3)
    k, u, v = (0.1 * torch.randn(shape[2], shape[4], 128, shape[3], device="cuda").to(dtype) for _ in range(3))
    r = triton_router.forward(q, router)
    expected = gluon_backend.forward(q, k, u, v, r)
    for _ in range(100):
        found = gluon_backend.routed_forward(q, k, u, v, router)
        assert (found.double() - expected.double()).norm() < 2e-3 * expected.double().norm()
    exact = flash_mhf_reference(*(x.double() for x in (q, k, u, v)), router_weights(q.double(), router.double()))
    errors = [(o.double() - exact).norm() for o in (found, expected)]
    assert errors[0] < 1.05 * errors[1]


def test_repeats_are_bitwise_equal():
    inputs = op_inputs(SHAPES[5])
    grad = torch.randn_like(inputs[0])

    def results():
        o = routed(*inputs)
        return [o, *torch.autograd.grad(o, inputs, grad)]

    first = results()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))


def test_compiled_and_captured():
    inputs = [x.detach() for x in op_inputs((2, 256, 4, 128, 11))]
    compiled = torch.compile(lambda q, *rest: routed(q * 2, *rest).square(), fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), routed(inputs[0] * 2, *inputs[1:]).square())
    graph = torch.cuda.CUDAGraph()
    routed(*inputs)
    with torch.cuda.graph(graph):
        o = routed(*inputs)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    assert torch.equal(o, routed(*inputs))


def test_memory_is_that_of_the_output_and_r_of_the_output_alone_on_hopper():
    inputs = [x.detach() for x in op_inputs((1, 65536, 8, 128, 11))]
    routed(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = routed(*inputs)
    r = 0 if torch.cuda.get_device_capability() == (9, 0) else 65536 * 8 * 11 * 4
    assert torch.cuda.max_memory_allocated() - before <= o.numel() * 2 + r + 8 * 2**20
