"""The op's numbers: against the formula in float64, and against the unfused bfloat16 path."""

from __future__ import annotations

import pytest
import torch
from mhf_kernels import flash_mhf, flash_mhf_reference

NAMES = ("q", "k", "u", "v", "r")
SHAPES = [
    {},
    {"batch": 1, "length": 1},
    {"batch": 3, "length": 1},
    {"heads": 4, "kuv_heads": 2},
    {"heads": 6, "kuv_heads": 1, "subnetworks": 2},
    {"subnetworks": 1},
    {"heads": 1, "d_e": 5},
    {"d_h": 3, "d_e": 1},
    {"batch": 1, "length": 37, "d_e": 11},
]


def value_and_grads(fn, inputs, grad):
    """The output and the five gradients, for the gradient `grad` of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", ["small", "default"])
def test_equals_the_formula_in_float64(make_inputs, request, shape, blocks):
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    inputs = make_inputs(**shape, dtype=torch.float64)
    grad = torch.randn_like(inputs[0])
    got = value_and_grads(flash_mhf, inputs, grad)
    expected = value_and_grads(flash_mhf_reference, inputs, grad)
    for name, a, b in zip(("o", *NAMES), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_block_wider_than_d_e_and_several_default_blocks(make_inputs):
    inputs = make_inputs(d_e=300, subnetworks=2, length=3, dtype=torch.float64)
    grad = torch.randn_like(inputs[0])
    for a, b in zip(
        value_and_grads(flash_mhf, inputs, grad), value_and_grads(flash_mhf_reference, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_no_tokens(make_inputs):
    inputs = make_inputs(length=0)
    out, *grads = value_and_grads(flash_mhf, inputs, torch.empty_like(inputs[0]))
    assert out.shape == inputs[0].shape
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, inputs, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_strides_do_not_matter(make_inputs):
    inputs = make_inputs(dtype=torch.float64, kuv_heads=2)
    grad = torch.randn_like(inputs[0])
    expected = value_and_grads(flash_mhf, inputs, grad)

    def strided(x):  # the same values, dimensions stored in reverse order with a gap
        y = torch.empty(*x.shape[::-1], 2, dtype=x.dtype)[..., 0].permute(3, 2, 1, 0)
        y.copy_(x.detach())
        assert not y.is_contiguous()
        return y

    got = value_and_grads(flash_mhf, [strided(x) for x in inputs], strided(grad))
    assert got[0].is_contiguous()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_expanded_gradient(make_inputs):
    inputs = make_inputs(dtype=torch.float64)
    grads = torch.autograd.grad(flash_mhf(*inputs).sum(), inputs)  # sum() hands back a gradient of stride 0
    expected = torch.autograd.grad(flash_mhf_reference(*inputs).sum(), inputs)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("small_blocks")
def test_gradcheck(make_inputs):
    inputs = make_inputs(batch=1, length=3, heads=2, kuv_heads=1, d_h=3, subnetworks=2, d_e=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(flash_mhf, inputs)


@pytest.mark.parametrize("wanted", [*[(n,) for n in NAMES], ("q", "r"), ("q", "v"), ("k", "u", "v"), ("u", "r")])
def test_partial_gradients(make_inputs, wanted):
    inputs = make_inputs(dtype=torch.float64)
    full = dict(zip(NAMES, torch.autograd.grad(flash_mhf(*inputs).square().sum(), inputs), strict=True))
    some = {name: x.detach().requires_grad_(name in wanted) for name, x in zip(NAMES, inputs, strict=True)}
    flash_mhf(**some).square().sum().backward()
    for name, x in some.items():
        if name in wanted:
            torch.testing.assert_close(x.grad, full[name], msg=name)
        else:
            assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("r_is_float32", [True, False])
def test_dtypes_of_results(make_inputs, dtype, r_is_float32):
    inputs = make_inputs(dtype=dtype, r_dtype=torch.float32 if r_is_float32 else dtype)
    out = flash_mhf(*inputs)
    assert out.dtype == dtype
    out.sum().backward()
    assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]


def test_repeats_are_bitwise_equal(make_inputs):
    inputs = make_inputs(length=300, d_h=32, d_e=64)
    grad = torch.randn_like(inputs[0])
    first, second = value_and_grads(flash_mhf, inputs, grad), value_and_grads(flash_mhf, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BF16_CASES = {
    "plain": {"length": 64, "d_h": 64, "subnetworks": 4, "d_e": 96},
    "large pre-activations": {"length": 64, "d_h": 64, "subnetworks": 4, "d_e": 96, "scale": 5.0},
    "grouped, d_h 96": {"length": 32, "d_h": 96, "kuv_heads": 2, "d_e": 64},
    "many tokens": {
        "length": 32768,
        "heads": 1,
        "d_h": 16,
        "subnetworks": 2,
        "d_e": 24,
    },  # weight gradients sum over all
}


@pytest.mark.parametrize("shape", BF16_CASES.values(), ids=BF16_CASES.keys())
def test_autocast_error_is_at_most_twice_that_of_the_unfused_path(make_inputs, shape):
    """flash-attention's rule: both against float64 on inputs that bfloat16 represents exactly."""
    check_bfloat16_error(make_inputs, shape, factor=2)


@pytest.mark.usefixtures("small_blocks")
def test_sums_over_many_blocks_lose_nothing(make_inputs):
    """80 blocks of d_ff and 43 chunks of tokens: bfloat16 running sums would fail this."""
    check_bfloat16_error(make_inputs, BF16_CASES["plain"], factor=1.5)


def check_bfloat16_error(make_inputs, shape, factor):
    low = make_inputs(**shape, dtype=torch.bfloat16, r_dtype=torch.float32)
    grad = torch.randn(low[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = value_and_grads(flash_mhf_reference, [x.double() for x in low], grad)
    unfused = value_and_grads(flash_mhf_reference, low, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_grads(flash_mhf, [x.float() for x in low], grad)
    for name, truth, eager, ours in zip(("o", *NAMES), exact, unfused, got, strict=True):
        error, allowed = (ours.double() - truth).abs(), (eager.double() - truth).abs()
        assert error.max() <= factor * allowed.max(), name
        assert error.square().mean().sqrt() <= factor * allowed.square().mean().sqrt(), name
