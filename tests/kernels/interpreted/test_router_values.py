"""The gate's Triton kernels in the interpreter, at small shapes: values against float64, strides, support."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from mhf_kernels import blocked_router, dispatch, flash_mhf, flash_mhf_reference, router_weights, triton_router
from mhf_kernels.reference import router_weights_backward

SHAPES = [  # batch, length, heads, d_h, E
    (1, 1, 1, 16, 1),
    (2, 40, 2, 48, 3),
    (1, 130, 1, 96, 17),
    (3, 65, 2, 32, 16),
    (1, 70, 2, 256, 5),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch) -> Iterator[None]:
    """Fill every torch.empty with NaN, so that an element which no kernel writes is seen."""
    monkeypatch.delenv("MHF_BACKEND", raising=False)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make(shape, dtype=torch.float32, scale=1.0):
    batch, length, heads, d_h, subnetworks = shape
    q = torch.randn(batch, length, heads, d_h).to(dtype)
    return q, scale * d_h**-0.5 * torch.randn(heads, d_h, subnetworks)


def check(q, router, tolerance, grad=None):
    assert dispatch.select_router(q, router) is triton_router
    grad = torch.randn(*q.shape[:3], router.shape[2]) if grad is None else grad
    r = triton_router.forward(q, router)
    assert r.permute(2, 3, 0, 1).is_contiguous()
    start = torch.randn(q.shape).to(q.dtype)
    dq = start.clone()
    dw = triton_router.backward(grad, q, router, dq)
    exact = router_weights(q.double(), router.double())
    exact_dq, exact_dw = router_weights_backward(grad.double(), q.double(), router.double())
    pairs = {"r": (r, exact), "dq": (dq, start.double() + exact_dq), "dw": (dw, exact_dw)}
    for name, (ours, truth) in pairs.items():
        assert (ours.double() - truth).norm() <= tolerance[name] * truth.norm(), name
    assert torch.equal(triton_router.backward(grad, q, router, None), dw)


@pytest.mark.parametrize("walked", [16, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(monkeypatch, shape, walked):
    monkeypatch.setattr(triton_router, "MOST_TILES", walked)
    check(*make(shape), dict.fromkeys(("r", "dq", "dw"), 2e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_16_bit_queries(dtype, scale):
    unit = 2**-7 if dtype == torch.bfloat16 else 2**-10  # the interpreter truncates where a GPU rounds
    check(*make((2, 70, 2, 32, 5), dtype, scale), {"r": 1e-6, "dq": unit, "dw": 1e-6})


def test_strides():
    """Slices of sequences, heads apart, a transposed router, an expanded gradient."""
    q, router = make((2, 90, 4, 32, 5))
    q = torch.stack((q, q + 1)).permute(1, 2, 3, 4, 0)[:, 5:80, ::2, :, 0]
    router = router[::2].mT.contiguous().mT
    check(q, router, dict.fromkeys(("r", "dq", "dw"), 2e-6), torch.randn(1, 75, 1, 5).expand(2, 75, 2, 5))


def test_the_halves_of_the_router():
    _, router = make((1, 1, 3, 48, 5))
    halves = triton_router.split(router.mT.contiguous().mT, torch.bfloat16, 16)
    assert halves.shape == (3, 2, 16, 48)
    sums = halves.double().sum(1)
    assert (sums[:, :5] - router.mT).abs().max() < 2**-15 * router.abs().max()
    assert not sums[:, 5:].any()


def test_no_tokens():
    q, router = make((2, 0, 2, 32, 5))
    assert triton_router.forward(q, router).shape == (2, 0, 2, 5)
    assert not triton_router.backward(torch.empty(2, 0, 2, 5), q, router, torch.empty_like(q)).any()


def test_the_op_goes_through_them():
    q, router = make((2, 20, 2, 32, 3))
    k, u, v = (0.2 * torch.randn(2, 3, 16, 32) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, u, v, router)]
    o, expected = flash_mhf(q, k, u, v, router=router), flash_mhf_reference(q, k, u, v, router_weights(q, router))
    grad = torch.randn_like(o)
    results = zip(*([x, *torch.autograd.grad(x, inputs, grad)] for x in (o, expected)), strict=True)
    assert dispatch.select(q, k, u, v, router_weights(q, router)).name == "triton"
    for ours, truth in results:
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 1, 512, 3), (1, 4, 1, 128, 33), (1, 4, 1, 8, 3)], ids=str)
def test_what_they_do_not_support_goes_to_pytorch(shape):
    assert dispatch.select_router(*make(shape)) is blocked_router
