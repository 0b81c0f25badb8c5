"""The layer: its formula, its parameters and how they start, its options and errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from mhf_kernels import FlashMHF, InitGains, flash_mhf_reference, router_weights

OPTIONS = [
    {},
    {"query_norm": False},
    {"skip_linear": True},
    {"num_kuv_heads": 2},
    {"num_kuv_heads": 1, "query_norm": False, "skip_linear": True},
]


def written_out(layer: FlashMHF, x: torch.Tensor) -> torch.Tensor:
    """PAPER's five steps, head by head."""
    state = layer.state_dict()
    q = x @ state["w_in.weight"].T if "w_in.weight" in state else x
    heads = []
    for h, q_h in enumerate(q.split(layer.d_h, dim=-1)):
        if "q_norm.weight" in state:
            q_h = q_h / (q_h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state["q_norm.weight"][h]
        gate = torch.sigmoid(q_h @ state["router"][h])
        gate = gate / gate.sum(-1, keepdim=True)
        k, u, v = (state[name][h * layer.num_kuv_heads // layer.num_heads] for name in "kuv")
        heads.append(sum(gate[..., e, None] * ((F.silu(q_h @ k[e].T) * (q_h @ u[e].T)) @ v[e]) for e in range(len(k))))
    s = torch.cat(heads, dim=-1)
    return s @ state["w_out.weight"].T if "w_out.weight" in state else s


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_is_the_formula(options):
    torch.manual_seed(0)
    layer = FlashMHF(24, 4, 3, 10, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), written_out(layer, x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_reach_every_parameter_and_the_input(options):
    torch.manual_seed(0)
    layer = FlashMHF(24, 4, 3, 10, **options)
    x = torch.randn(2, 5, 24, requires_grad=True)
    layer(x).square().sum().backward()
    for name, p in [("x", x), *layer.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_state_dict_keys_and_shapes_are_stable():
    shapes = {name: list(p.shape) for name, p in FlashMHF(24, 4, 3, 10, num_kuv_heads=2).state_dict().items()}
    assert shapes == {
        "w_in.weight": [24, 24],
        "q_norm.weight": [4, 6],
        "router": [4, 6, 3],
        "k": [2, 3, 10, 6],
        "u": [2, 3, 10, 6],
        "v": [2, 3, 10, 6],
        "w_out.weight": [24, 24],
    }
    bare = FlashMHF(24, 4, 3, 10, skip_linear=True, query_norm=False)
    assert set(bare.state_dict()) == {"router", "k", "u", "v"}


def test_meta_device_then_reset_equals_a_direct_build():
    layer = FlashMHF(24, 4, 3, 10, device="meta")
    assert layer(torch.empty(2, 5, 24, device="meta")).shape == (2, 5, 24)
    layer.to_empty(device="cpu")
    direct = FlashMHF(24, 4, 3, 10)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    for each in (layer, direct):
        torch.manual_seed(0)
        each.reset_parameters()
    for name, p in direct.state_dict().items():
        assert torch.equal(layer.state_dict()[name], p), name


def test_the_gate_is_float32_also_in_low_precision():
    torch.manual_seed(0)
    q, router = torch.randn(2, 5, 4, 6), torch.randn(4, 6, 3)
    expected = router_weights(q, router)
    torch.testing.assert_close(expected.sum(-1), torch.ones(2, 5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router_weights(q, router), expected)
    low = router_weights(q.bfloat16(), router.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, router_weights(q.bfloat16().float(), router.bfloat16().float()), rtol=0, atol=0)


def test_the_gate_survives_logits_that_underflow():
    r = router_weights(torch.full((1, 1, 1, 1), -1.0), torch.full((1, 1, 2), 200.0))
    assert torch.isfinite(r).all()


def test_router_weights_of_the_layer_are_those_it_uses():
    torch.manual_seed(0)
    layer = FlashMHF(24, 4, 3, 10, skip_linear=True)
    x = torch.randn(2, 5, 24)
    q = layer.queries(x)
    by_hand = flash_mhf_reference(q, layer.k, layer.u, layer.v, router_weights(q, layer.router)).flatten(2)
    torch.testing.assert_close(layer(x), by_hand)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_softmax_gate(recompute):
    torch.manual_seed(0)
    layer = FlashMHF(24, 4, 3, 10, skip_linear=True, gate="softmax", recompute_queries=recompute)
    x = torch.randn(2, 5, 24)
    q = layer.queries(x)
    r = torch.softmax(torch.stack([q[:, :, h] @ layer.router[h] for h in range(4)], dim=2), dim=-1)
    expected = flash_mhf_reference(q, layer.k, layer.u, layer.v, r).flatten(2)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(y.sin().sum(), list(layer.parameters())) for y in (found, expected))
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth)


def test_an_unknown_gate_is_named():
    with pytest.raises(ValueError, match="gate is 'top1'; it must be one of sigmoid, softmax"):
        FlashMHF(24, 4, 3, 10, gate="top1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whole_layer_in_another_dtype(dtype):
    layer = FlashMHF(24, 4, 3, 10, dtype=dtype)
    out = layer(torch.randn(2, 5, 24, dtype=dtype))
    out.sum().backward()
    assert out.dtype == dtype
    assert all(p.grad.dtype == dtype for p in layer.parameters())


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


SIZES = [(256, 4, 4, 192), (512, 4, 3, 320), (768, 6, 8, 256), (512, 16, 2, 96)]


@pytest.mark.parametrize("query_norm", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_scale_of_the_output_at_the_start(size, query_norm):
    torch.manual_seed(0)
    d_model, _, num_subnetworks, d_e = size
    x = F.rms_norm(torch.randn(1, 128, d_model), (d_model,))
    gate, up, down = (0.02 * torch.randn(d_model, num_subnetworks * d_e) for _ in range(3))
    swiglu = rms((F.silu(x @ gate) * (x @ up)) @ down.T)
    matched = FlashMHF(*size, query_norm=query_norm, initialization="variance_matched")
    released = FlashMHF(*size, query_norm=query_norm, initialization="paper")
    assert 0.5 < rms(matched(x)) / swiglu < 1.5
    assert rms(released(x)) < swiglu / 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"initialization": "paper"}, {"k": 0.02, "u": 0.02, "v": 0.02, "router": 0.02, "gain": 0.707}),
        ({}, {"k": 0.04, "u": 0.04, "v": 0.16, "router": 0.02, "gain": 0.707}),
        ({"query_norm": False}, {"k": 0.04 / 0.707, "u": 0.04 / 0.707, "v": 0.16, "router": 0.02, "gain": 0.707}),
        ({"query_norm": False, "skip_linear": True}, {"k": 0.04, "u": 0.04, "v": 0.16, "router": 0.02}),
        (
            {"query_norm": False, "gains": InitGains(linear_gain=0.5)},
            {"k": 0.08, "u": 0.08, "v": 0.16, "router": 0.02, "gain": 0.5},
        ),
        (
            {"initialization": "paper", "gains": InitGains(k_std=0.1, u_std=0.2, v_std=0.3, router_std=0.0)},
            {"k": 0.1, "u": 0.2, "v": 0.3, "router": 0.0, "gain": 0.707},
        ),
    ],
    ids=str,
)
def test_values_of_the_initialisations(options, expected):
    torch.manual_seed(0)
    state = FlashMHF(256, 4, 8, 128, **options).state_dict()  # sqrt(d_model / d_h) = 2, E = 8
    stds = {name: state[name].std().item() for name in ("k", "u", "v", "router")}
    assert stds == pytest.approx({name: expected[name] for name in stds}, rel=0.05)
    if "gain" in expected:
        bound = expected["gain"] * math.sqrt(6 / (256 + 256))
        for name in ("w_in.weight", "w_out.weight"):
            assert 0.99 * bound < state[name].abs().max() <= bound
    if "q_norm.weight" in state:
        assert torch.equal(state["q_norm.weight"], torch.ones(4, 64))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((24, 5, 3, 10), {}, "d_model must be a multiple of num_heads; got d_model 24 and num_heads 5"),
        ((24, 4, 3, 10), {"num_kuv_heads": 3}, "multiple of num_kuv_heads; got num_heads 4, num_kuv_heads 3"),
        ((24, 4, 3, 10), {"num_kuv_heads": 0}, "num_kuv_heads must be at least 1; got 0"),
        ((24, 4, 0, 10), {}, "num_subnetworks must be at least 1; got 0"),
        ((-24, 4, 3, 10), {}, "d_model must be at least 1; got -24"),
        ((24, 4, 3, 10), {"initialization": "xavier"}, "unknown initialization 'xavier'; allowed: paper, variance_m"),
    ],
)
def test_bad_sizes_are_named(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        FlashMHF(*sizes, **options)


def test_bad_gains_are_named():
    with pytest.raises(ValueError, match=r"gains\.k_std must be a finite number >= 0 or None; got -1"):
        InitGains(k_std=-1)


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 23)])
def test_bad_layer_input_is_named(shape):
    with pytest.raises(ValueError, match=r"must be \[B, L, d_model = 24\]; got"):
        FlashMHF(24, 4, 3, 10)(torch.zeros(shape))
