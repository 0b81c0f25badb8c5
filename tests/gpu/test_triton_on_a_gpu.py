"""The Triton kernels on a CUDA device: accuracy, exactness, repeats, large offsets, few tokens, graphs, compilation."""

from __future__ import annotations

import copy
import itertools

import mhf_kernels.layer as mhf_layer
import pytest
import torch
import torch.nn.functional as F
from mhf_kernels import FlashMHF, flash_mhf, flash_mhf_reference, router_weights, triton_backend, tuning
from torch._dynamo.testing import CompileCounterWithBackend

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("o", "q", "k", "u", "v", "r")
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def triton_only(monkeypatch):
    monkeypatch.setenv("MHF_BACKEND", "triton")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill every torch.empty with NaN, so that an element which no kernel writes is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make(shape, dtype, std=1.0):
    """Fresh inputs with pre-activations of standard deviation `std`; r as `router_weights` lays it out."""
    batch, length, heads, kuv_heads, subnetworks, d_e, d_h = shape
    weights = (kuv_heads, subnetworks, d_e, d_h)
    q = torch.randn(batch, length, heads, d_h, device="cuda")
    k, u, v = (torch.randn(weights, device="cuda") for _ in range(3))
    r = torch.rand(heads, subnetworks, batch, length, device="cuda").permute(2, 3, 0, 1)
    return [*(x.to(dtype) for x in (q, std * d_h**-0.5 * k, d_h**-0.5 * u, d_e**-0.5 * v)), r]


def values(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = function(*inputs)
    return [o.detach(), *torch.autograd.grad(o, inputs, grad.to(o.dtype))]


def eager(q, k, u, v, r):
    """The unfused path in the dtype of q: every product is rounded to it, r is not."""
    k, u, v = (w.repeat_interleave(q.shape[2] // w.shape[0], dim=0) for w in (k, u, v))
    m, n = (torch.einsum("blhd,hefd->blhef", q, w) for w in (k, u))
    s = torch.einsum("blhef,hefd->blhed", F.silu(m) * n, v)
    return (s * r.unsqueeze(-1)).sum(dim=3).to(q.dtype)


def check_accuracy_rule(inputs):
    """Maximum and RMS error against float64 at most twice those of the unfused eager path in the same dtype.

    In float32, where both are a few units in the last place, the largest error is one element's chance: sixteen units
    of the largest value are allowed (seen: twelve, of dQ with scores in the hundreds). A product in TF32 has thousands.
    """
    grad = torch.randn_like(inputs[0])
    exact = values(flash_mhf_reference, [x.double() for x in inputs], grad)
    results = zip(NAMES, values(flash_mhf, inputs, grad), values(eager, inputs, grad), exact, strict=True)
    for name, ours, plain, truth in results:
        error, allowed = ours.double() - truth, plain.double() - truth
        units = 2**-19 * truth.abs().max().item() if ours.dtype == torch.float32 else 0.0
        assert error.abs().max().item() <= max(2 * allowed.abs().max().item(), units), name
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt(), name


SHAPES = [  # batch, length, heads, kuv_heads, subnetworks, d_e, d_h
    (2, 300, 4, 4, 3, 80, 128),
    (2, 300, 4, 2, 2, 64, 96),
    (1, 257, 2, 1, 2, 48, 256),
    (3, 5, 4, 2, 3, 16, 16),
    (1, 2049, 2, 2, 2, 192, 64),
    (2, 130, 2, 2, 2, 64, 32),
    (1, 100, 2, 2, 2, 112, 176),
]


@pytest.mark.parametrize("gate", ["fast", "exact"])
@pytest.mark.parametrize("std", [1, 6])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_rule(monkeypatch, shape, dtype, std, gate):
    monkeypatch.setenv("MHF_GATE", gate)
    check_accuracy_rule(make(shape, dtype, std))


@pytest.mark.parametrize("std", [1, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_rule_in_float32(shape, std):
    check_accuracy_rule(make(shape, torch.float32, std))


@pytest.mark.parametrize("shape", [(1, 1, 2, 1, 2, 48, 96), (1, 16, 16, 16, 22, 256, 128), (64, 1, 4, 2, 3, 64, 64)])
@pytest.mark.parametrize("dtype", HALF)
def test_accuracy_rule_of_a_few_tokens(shape, dtype):
    check_accuracy_rule(make(shape, dtype))


def test_one_token_in_float32():
    """Eager multiplies a single row by another kernel, with shorter sums: so the bound is in float32's own unit."""
    inputs = make((1, 1, 2, 1, 2, 48, 96), torch.float32)
    grad = torch.randn_like(inputs[0])
    exact = values(flash_mhf_reference, [x.double() for x in inputs], grad)
    for ours, truth in zip(values(flash_mhf, inputs, grad), exact, strict=True):
        assert (ours.double() - truth).norm() <= 16 * torch.finfo(torch.float32).eps * truth.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_weight_gradients_over_65536_tokens(dtype):
    check_accuracy_rule(make((4, 16384, 2, 1, 1, 64, 128), dtype))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_accuracy_rule_through_the_whole_layer(monkeypatch, dtype, recompute):
    """The output, dX and the gradient of every weight; the layer with its intermediates in memory is the yardstick."""
    layer = FlashMHF(256, 2, 3, 96, recompute_queries=recompute, device="cuda").to(dtype)
    x = torch.randn(2, 300, 256, device="cuda").to(dtype)
    grad = torch.randn_like(x)

    def run(module, x):
        x = x.detach().requires_grad_()
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))]

    def routed(q, k, u, v, *, router):
        return eager(q, k, u, v, router_weights(q, router))

    ours = run(layer, x)
    monkeypatch.setattr(mhf_layer, "flash_mhf", routed)
    plain, exact = run(layer, x), run(copy.deepcopy(layer).double(), x.double())
    for name, a, b, truth in zip(["y", "x", *dict(layer.named_parameters())], ours, plain, exact, strict=True):
        error, allowed = a.double() - truth, b.double() - truth
        assert error.abs().max() <= 2 * allowed.abs().max(), name
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt(), name


def test_pointers_for_what_a_descriptor_cannot_express():
    inputs = make((2, 131, 4, 2, 2, 64, 64), torch.bfloat16)

    def gapped(x):
        y = torch.full((*x.shape, 3), float("nan"), device="cuda", dtype=x.dtype)[..., 1]
        return y.copy_(x)

    grad = torch.randn_like(inputs[0])
    plain, strided = values(flash_mhf, inputs, grad), values(flash_mhf, [gapped(x) for x in inputs], gapped(grad))
    for name, a, b in zip(NAMES, plain, strided, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)


def sparse_integers(shape, allowed):
    """Rows with three entries other than 0, so that every product and sum of the op is exact in 16 bits."""
    x = torch.zeros(shape, device="cuda")
    columns = torch.rand(shape, device="cuda").argsort(-1)[..., :3]
    return x.scatter_(-1, columns, torch.tensor(allowed, device="cuda")[torch.randint(len(allowed), columns.shape)])


def exact_inputs(shape):
    """Integer inputs: M is 0 or at least 32, where SiLU(M) = M in float32, and r a power of two."""
    batch, length, heads, kuv_heads, subnetworks, d_e, d_h = shape
    weights = (kuv_heads, subnetworks, d_e, d_h)
    q = sparse_integers((batch, length, heads, d_h), [1.0])
    k = 32.0 * torch.randint(2, weights, device="cuda")
    u, v = (torch.randint(-1, 2, weights, device="cuda").float() for _ in range(2))
    r = 2.0 ** torch.randint(-1, 2, (batch, length, heads, subnetworks), device="cuda")
    return [q, k, u, v, r], sparse_integers(q.shape, [-1.0, 1.0])


@pytest.mark.parametrize("gate", ["fast", "exact"])
@pytest.mark.parametrize("d_h", [32, 64, 96, 128, 256])
def test_integers_are_exact_and_50_repeats_bitwise_equal(monkeypatch, d_h, gate):
    """Also on busy shapes: an operand that is overwritten while in flight would show as a wrong integer."""
    monkeypatch.setenv("MHF_GATE", gate)
    inputs, grad = exact_inputs((1, 1500, 4, 4, 4, 192, d_h))
    expected = values(flash_mhf_reference, inputs, grad)
    half = [*(x.bfloat16() for x in inputs[:4]), inputs[4]]
    first = values(flash_mhf, half, grad)
    for name, ours, truth in zip(NAMES, first, expected, strict=True):
        assert torch.equal(ours, truth.to(ours.dtype)), name
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(values(flash_mhf, half, grad), first, strict=True))


def run_alone(kernel, inputs, grad):
    """Launch one kernel; return what it computes, by name."""
    if kernel in ("forward", "decode"):
        return {"o": triton_backend.forward(*inputs)}
    tokens = kernel == "backward_tokens"
    grads = triton_backend.backward(grad, *inputs, (tokens, not tokens, not tokens, not tokens, tokens))
    return {name: x for name, x in zip(NAMES[1:], grads, strict=True) if x is not None}


@pytest.mark.filterwarnings("error::mhf_kernels.triton_backend.TileWarning")  # the default would run instead
@pytest.mark.parametrize("d_h", [32, 64, 128, 256])
def test_every_shipped_tile_is_exact(monkeypatch, d_h):
    """Each row of the table for this GPU, in the kernel that it is for, on integers."""
    arch = triton_backend.arch(torch.device("cuda"))
    rows = [name for name in tuning.table() if name.split("/")[1:3] == [arch, str(d_h)]]
    if not rows:
        pytest.skip(f"the table has no rows for {arch}")
    launched = []
    launch = triton_backend._with_tile
    monkeypatch.setattr(triton_backend, "_with_tile", lambda name, *rest: (launched.append(name), launch(name, *rest)))
    compared = []
    for name in rows:
        kernel, _, _, dtypes = name.split("/")
        for length in (1, 16, 40, 64) if kernel == "decode" else (700,):
            inputs, grad = exact_inputs((1, length, 4, 2, 3, 128, d_h))
            expected = dict(zip(NAMES, values(flash_mhf_reference, inputs, grad), strict=True))
            for dtype in HALF if dtypes == "half" else [torch.float32]:
                cast = [*(x.to(dtype) for x in inputs[:4]), inputs[4]]
                for which, ours in run_alone(kernel, cast, grad.to(dtype)).items():
                    assert torch.equal(ours, expected[which].to(ours.dtype)), (name, length, dtype, which)
                assert launched.pop() == kernel
                assert not launched
        compared.append(name)
    # Every kernel, for 16-bit inputs and for float32.
    assert len(compared) == 2 * len(tuning.KERNELS)


def test_offsets_past_2_31_elements():
    """1,050,000 tokens of d_model 2048 are 2.15e9 elements; the last tokens must equal the same tokens alone."""
    torch.use_deterministic_algorithms(False)
    length, heads, d_h = 1_050_000, 16, 128
    assert length * heads * d_h > 2**31
    inputs = make((1, 1024, heads, heads, 1, 64, d_h), torch.bfloat16)
    tail_q, k, u, v, tail_r = inputs
    q = torch.zeros(1, length, heads, d_h, device="cuda", dtype=torch.bfloat16)
    r = torch.zeros(heads, 1, 1, length, device="cuda").permute(2, 3, 0, 1)
    q[:, -1024:], r[:, -1024:] = tail_q, tail_r
    o = triton_backend.forward(q, k, u, v, r)
    assert torch.equal(o[:, -1024:], triton_backend.forward(*inputs))
    assert not o[:, :-1024].any()
    tail_grad = torch.randn_like(tail_q)
    grad = torch.zeros_like(q)
    grad[:, -1024:] = tail_grad
    big = triton_backend.backward(grad, q, k, u, v, r, (True,) * 5)
    small = triton_backend.backward(tail_grad, *inputs, (True,) * 5)
    assert torch.equal(big[0][:, -1024:], small[0])
    assert torch.equal(big[4][:, -1024:], small[4])
    for a, b in zip(big[1:4], small[1:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_a_cuda_graph_captures_forward_and_backward():
    inputs = make((2, 100, 4, 2, 2, 64, 64), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    expected = values(flash_mhf, inputs, grad)
    fixed = [x.detach().clone().requires_grad_() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = flash_mhf(*fixed)
        captured = [o, *torch.autograd.grad(o, fixed, grad)]
    for x in captured:
        x.detach().zero_()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_a_compiled_block_has_one_graph_whatever_the_length():
    torch.use_deterministic_algorithms(False)
    ffn = FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=64)
    config = DecoderConfig(vocab_size=64, d_model=128, num_layers=1, num_attention_heads=2, ffn=ffn)
    model = Decoder(config).cuda()
    counter = CompileCounterWithBackend("inductor")
    model.blocks[0].compile(fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (72, 200, 333):  # equal to no other size: the compiler takes equal sizes for one symbol
        tokens = torch.randint(64, (2, length), device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(tokens, tokens).nll.backward()
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_inference_allocates_the_output_only():
    torch.use_deterministic_algorithms(False)
    inputs = make((1, 32768, 8, 8, 4, 256, 128), torch.bfloat16)
    flash_mhf(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = flash_mhf(*inputs)
    assert torch.cuda.max_memory_allocated() - before == o.numel() * o.element_size()


def test_partial_gradients():
    inputs = make((2, 130, 4, 2, 2, 64, 64), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    full = triton_backend.backward(grad, *inputs, (True,) * 5)
    for needs in itertools.product([True, False], repeat=5):
        some = triton_backend.backward(grad, *inputs, needs)
        for wanted, a, b in zip(needs, some, full, strict=True):
            assert (a is not None) == wanted
            if wanted:
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
