"""The op as PyTorch sees it: registrations, autocast, compile, checkpointing, FLOPs, errors, backends."""

from __future__ import annotations

import functools
import sys
import types

import pytest
import torch
from mhf_kernels import BackendUnavailableError, FlashMHF, blocked, dispatch, flash_mhf
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

FORWARD, BACKWARD = torch.ops.mhf.flash_mhf, torch.ops.mhf.flash_mhf_backward


OPCHECK_CASES = [
    {},
    {"kuv_heads": 2, "subnetworks": 1},
    {"dtype": torch.bfloat16, "r_dtype": torch.float32},
]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", OPCHECK_CASES, ids=str)
def test_opcheck(make_inputs, shape, contiguous):
    inputs = [x.detach() for x in make_inputs(**shape)]
    if not contiguous:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    for needs in ((True,) * 5, (False, True, False, True, False)):
        torch.library.opcheck(BACKWARD.default, (torch.randn_like(inputs[0]), *inputs, *needs))
    torch.library.opcheck(FORWARD.default, [x.requires_grad_() for x in inputs])


def test_a_gradient_that_is_not_needed_is_an_empty_tensor(make_inputs):
    inputs = make_inputs(requires_grad=False)
    grads = BACKWARD(inputs[0], *inputs, True, False, True, False, False)
    assert [list(g.shape) for g in grads] == [list(inputs[0].shape), [0], list(inputs[2].shape), [0], [0]]


def test_second_derivatives_are_refused(make_inputs):
    inputs = make_inputs()
    (dq,) = torch.autograd.grad(flash_mhf(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"flash_mhf_backward.* no autograd formula"):
        dq.sum().backward()


@pytest.mark.parametrize("spoiled", ["q", "k", "u", "v", "r"])
def test_forward_mode_derivatives_are_refused(make_inputs, spoiled):
    inputs = dict(zip("qkuvr", make_inputs(), strict=True))

    def function(x):
        return flash_mhf(**{name: x if name == spoiled else value.detach() for name, value in inputs.items()})

    x = inputs[spoiled].detach()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        assert function(x).shape == inputs["q"].shape  # others may be differentiated
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"), torch.no_grad():
            function(forward_ad.make_dual(x, torch.ones_like(x)))


def test_autocast_casts_all_but_r(make_inputs):
    inputs = make_inputs()  # float32; r has digits that bfloat16 would lose
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_mhf(*inputs)
    by_hand = flash_mhf(*(x.bfloat16() for x in inputs[:4]), inputs[4])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, by_hand)
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert [g.dtype for g in grads] == [torch.float32] * 5
    assert torch.equal(grads[4], torch.autograd.grad(by_hand.float().sum(), inputs[4:])[0])
    assert not torch.equal(grads[4], grads[4].bfloat16().float())


def test_autocast_takes_mixed_inputs_and_leaves_float64_alone(make_inputs):
    q, k, u, v, r = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flash_mhf(q.bfloat16(), k, u, v, r.bfloat16().float()), flash_mhf(q, k, u, v, r.bfloat16()))
        assert flash_mhf(*(x.double() for x in (q, k, u, v, r))).dtype == torch.float64
        with pytest.raises(ValueError, match="autocast does not cast float64"):
            flash_mhf(q, k.double(), u, v, r)


def test_no_advice_to_use_the_autocast_that_is_on(make_inputs):
    q, *others = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="as autocast does not cast fl"):
        flash_mhf(q.double(), *others)


def test_autocast_is_registered_for_cuda():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mhf::flash_mhf", "AutocastCUDA")


def test_flops_are_model_flops(make_inputs):
    inputs = make_inputs(batch=2, length=5, heads=4, kuv_heads=2, d_h=8, subnetworks=3, d_e=12)
    forward = 6 * (2 * 5) * 4 * 8 * (3 * 12)
    with FlopCounterMode(display=False) as counter:
        flash_mhf(*inputs).sum().backward()
    assert counter.get_flop_counts()["Global"] == {FORWARD: forward, BACKWARD: 2 * forward}


def test_checkpointing(make_inputs):
    inputs = make_inputs()

    def loss(x):
        return flash_mhf(x.sin(), *inputs[1:]).square().sum()

    def save_the_op(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is FORWARD.default else CheckpointPolicy.PREFER_RECOMPUTE

    selective = functools.partial(create_selective_checkpoint_contexts, save_the_op)
    expected = torch.autograd.grad(loss(inputs[0]), inputs)
    forward_flops = {}
    for name, options in {"full": {}, "selective": {"context_fn": selective}}.items():
        with FlopCounterMode(display=False) as counter:
            grads = torch.autograd.grad(checkpoint(loss, inputs[0], use_reentrant=False, **options), inputs)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        forward_flops[name] = counter.get_flop_counts()["Global"][FORWARD]
    assert forward_flops["full"] == 2 * forward_flops["selective"]


def _loss_and_grads(fn, layer, x):
    layer.zero_grad()
    out = fn(x)
    out.float().sin().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in layer.parameters())]


def test_compiled_equals_eager_and_a_new_length_does_not_recompile():
    torch.manual_seed(0)
    layer = FlashMHF(32, 4, 3, 24, num_kuv_heads=2)
    compiled = torch.compile(layer, fullgraph=True)
    for length in (8, 13, 40):
        x = torch.randn(2, length, 32)
        torch._dynamo.mark_dynamic(x, 1)
        with torch.compiler.set_stance("default" if length == 8 else "fail_on_recompile"):
            for a, b in zip(_loss_and_grads(compiled, layer, x), _loss_and_grads(layer, layer, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_under_autocast_equals_eager():
    torch.manual_seed(0)
    layer = FlashMHF(32, 4, 3, 24, query_norm=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = _loss_and_grads(compiled, layer, x), _loss_and_grads(layer, layer, x)
    assert got[0].dtype == torch.bfloat16
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


BAD_INPUTS = {
    r"q must be \[B, L, H, d_h\].*got q \[10, 4, 8\]": lambda q, k, u, v, r: (q.flatten(0, 1), k, u, v, r),
    r"k, u and v must have one shape.*u \[4, 2, 12, 8\]": lambda q, k, u, v, r: (q, k, u[:, :2], v, r),
    r"same d_h.*got q \[2, 5, 4, 7\]": lambda q, k, u, v, r: (q[..., :7], k, u, v, r),
    r"multiple of the heads of k.*k \[3,": lambda q, k, u, v, r: (q, k[:3], u[:3], v[:3], r),
    r"no dimension of size 0": lambda q, k, u, v, r: (q, k[:, :0], u[:, :0], v[:, :0], r[..., :0]),
    r"r must be \[B, L, H, E\] = \[2, 5, 4, 3\].*got \[2, 5, 4, 2\]": lambda q, k, u, v, r: (q, k, u, v, r[..., :2]),
    r"must have one dtype.*k torch.bfloat16.*under torch.autocast": lambda q, k, u, v, r: (
        q,
        k.bfloat16(),
        u,
        v,
        r,
    ),
    r"r must have the dtype of q, or be torch.float32.*r torch.float16": lambda q, k, u, v, r: (q, k, u, v, r.half()),
    r"one of .*got q torch.int64": lambda q, k, u, v, r: (q.long(), k, u, v, r),
    r"one device.*v meta": lambda q, k, u, v, r: (q, k, u, v.to("meta"), r),
}


@pytest.mark.parametrize(("message", "spoil"), BAD_INPUTS.items(), ids=BAD_INPUTS.keys())
def test_bad_inputs_are_named(make_inputs, message, spoil):
    with pytest.raises(ValueError, match=message):
        flash_mhf(*spoil(*make_inputs(requires_grad=False)))


@pytest.mark.parametrize("backend", ["", "auto", "reference"])
def test_backends_that_exist(make_inputs, monkeypatch, backend):
    monkeypatch.setenv("MHF_BACKEND", backend)
    inputs = make_inputs()
    assert dispatch.select(*inputs).name == "reference"
    flash_mhf(*inputs)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cutlass", "MHF_BACKEND=cutlass is unknown; allowed: auto, gluon, triton, reference"),
        ("gluon", "MHF_BACKEND=gluon is not available here: the gluon kernels run on Hopper GPUs"),
    ],
)
def test_backends_that_do_not_exist(make_inputs, monkeypatch, backend, message):
    monkeypatch.setenv("MHF_BACKEND", backend)
    with pytest.raises(BackendUnavailableError, match=message):
        flash_mhf(*make_inputs())


def test_one_module_and_one_line_add_a_backend(make_inputs, monkeypatch):
    def forward(q, k, u, v, r):
        return 2 * blocked.forward(q, k, u, v, r)

    def supports(q, k, u, v, r):
        return None if q.shape[3] == 8 else "it is for d_h = 8 only"

    module = types.SimpleNamespace(name="gluon", supports=supports, forward=forward, backward=blocked.backward)
    monkeypatch.setitem(sys.modules, "doubling_backend", module)
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, "gluon": "doubling_backend"})
    fits, does_not_fit = make_inputs(d_h=8), make_inputs(d_h=4)
    assert torch.equal(flash_mhf(*fits), 2 * blocked.forward(*fits))
    assert torch.equal(flash_mhf(*does_not_fit), blocked.forward(*does_not_fit))
    monkeypatch.setenv("MHF_BACKEND", "gluon")
    match = "d_h = 8 only; unset it, or set it to one of: auto, triton, reference"
    with pytest.raises(BackendUnavailableError, match=match):
        flash_mhf(*does_not_fit)
