"""The op that takes the router's weight: registrations, gradients against autograd's, autocast, FLOPs, errors."""

from __future__ import annotations

import pytest
import torch
from mhf_kernels import blocked_router, dispatch, flash_mhf, flash_mhf_reference, router_weights
from mhf_kernels.reference import router_weights_backward
from torch.utils.flop_counter import FlopCounterMode

FORWARD, BACKWARD = torch.ops.mhf.flash_mhf_routed, torch.ops.mhf.flash_mhf_routed_backward


def make(dtype=torch.float64, router_dtype=None, kuv_heads=4):
    """q `[2, 5, 4, 8]`, k, u, v with 3 sub-networks of width 12, and the router."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(2, 5, 4, 8),
        *(0.4 * torch.randn(kuv_heads, 3, 12, 8) for _ in range(3)),
        torch.randn(4, 8, 3),
    ]
    dtypes = [dtype] * 4 + [router_dtype or dtype]
    return [x.to(d).requires_grad_() for x, d in zip(tensors, dtypes, strict=True)]


def routed(q, k, u, v, router):
    return flash_mhf(q, k, u, v, router=router)


def by_hand(q, k, u, v, router):
    return flash_mhf_reference(q, k, u, v, router_weights(q, router))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, torch.float32)], ids=str)
def test_opcheck(dtypes, contiguous):
    inputs = [x.detach() for x in make(*dtypes)]
    if not contiguous:
        inputs = [x.mT.contiguous().mT for x in inputs]
    for needs in ((True,) * 5, (False, True, False, True, False), (True, False, False, False, False)):
        torch.library.opcheck(BACKWARD.default, (torch.randn_like(inputs[0]), *inputs, *needs))
    torch.library.opcheck(FORWARD.default, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("kuv_heads", [4, 2, 1])
def test_values_and_gradients_are_those_of_the_formula(kuv_heads):
    inputs = make(kuv_heads=kuv_heads)
    o, expected = routed(*inputs), by_hand(*inputs)
    torch.testing.assert_close(o, expected)
    grad = torch.randn_like(o)
    for ours, truth in zip(*(torch.autograd.grad(x, inputs, grad) for x in (o, expected)), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("wanted", range(5))
def test_a_single_gradient(wanted):
    inputs = make()
    expected = torch.autograd.grad(by_hand(*inputs).sin().sum(), inputs[wanted])[0]
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    torch.testing.assert_close(torch.autograd.grad(routed(*inputs).sin().sum(), inputs[wanted])[0], expected)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (12.0, 0.0), (1.0, 60.0)])
def test_gradients_of_the_gate(scale, shift):
    """12: sigmoids saturate. Where all of them are next to nothing, their sum is clamped, and has no gradient."""
    torch.manual_seed(0)
    q, router = torch.rand(2, 5, 4, 6, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64) * scale - shift
    r = router_weights(q.requires_grad_(), router.requires_grad_())
    assert (r.sum(-1) < 0.99).any() == bool(shift)
    grad = torch.randn_like(r)
    found = router_weights_backward(grad, q.detach(), router.detach())
    for ours, truth in zip(found, torch.autograd.grad(r, (q, router), grad), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-18)


def test_autocast_leaves_the_router():
    q, k, u, v, router = make(torch.float32)  # the router has digits that bfloat16 would lose
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = routed(q, k, u, v, router)
        assert routed(*(x.double() for x in (q, k, u, v, router))).dtype == torch.float64
        with pytest.raises(ValueError, match="autocast does not cast float64"):
            routed(q, k, u, v, router.double())
    low = [x.bfloat16() for x in (q, k, u, v)]
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, routed(*low, router))
    assert not torch.equal(o, routed(*low, router.bfloat16()))
    grads = torch.autograd.grad(o.float().sum(), [q, k, u, v, router])
    assert [g.dtype for g in grads] == [torch.float32] * 5


def test_flops_are_model_flops():
    inputs = make()
    forward = (2 * 5) * 4 * 8 * (6 * 3 * 12 + 2 * 3)
    with FlopCounterMode(display=False) as counter:
        routed(*inputs).square().sum().backward()
    assert counter.get_flop_counts()["Global"] == {FORWARD: forward, BACKWARD: 2 * forward}


def test_only_its_inputs_are_kept():
    kept, inputs = [], make()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        routed(*inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs}


BAD_INPUTS = {
    "either r, the gate, or router": lambda q, k, u, v, w: flash_mhf(q, k, u, v),
    "either r, the gate, or router, ": lambda q, k, u, v, w: flash_mhf(q, k, u, v, router_weights(q, w), router=w),
    r"router must be \[H, d_h, E\] = \[4, 8, 3\].*got \[4, 7, 3\]": lambda q, k, u, v, w: routed(q, k, u, v, w[:, :7]),
    r"q, k, u, v, router must be on one device.*router meta": lambda q, k, u, v, w: routed(q, k, u, v, w.to("meta")),
    "router can be float64 only where q is": lambda q, k, u, v, w: routed(*(x.float() for x in (q, k, u, v)), w),
    "q, k, u, v, router must be of one of.*router torch.int64": lambda q, k, u, v, w: routed(q, k, u, v, w.long()),
}


@pytest.mark.parametrize(("message", "call"), BAD_INPUTS.items(), ids=BAD_INPUTS.keys())
def test_bad_inputs_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(*make())


def test_the_reference_backend_takes_the_plain_gate(monkeypatch):
    monkeypatch.setenv("MHF_BACKEND", "reference")
    inputs = make(torch.float32)
    assert dispatch.select_router(inputs[0], inputs[4]) is blocked_router
