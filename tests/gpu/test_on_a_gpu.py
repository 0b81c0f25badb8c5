"""The op, the layer and a training run on a CUDA device: accuracy, compilation, memory, bf16."""

import math

import pytest
import torch
from mhf_kernels import FlashMHF, flash_mhf, flash_mhf_reference

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    batch, length, heads, d_h, subnetworks, d_e = 2, 300, 4, 96, 3, 80
    q = torch.randn(batch, length, heads, d_h)
    k, u = (torch.randn(heads, subnetworks, d_e, d_h) / math.sqrt(d_h) for _ in range(2))
    v = torch.randn(heads, subnetworks, d_e, d_h) / math.sqrt(d_e)
    r = torch.rand(batch, length, heads, subnetworks).cuda().requires_grad_()
    return [*(x.cuda().to(dtype).requires_grad_() for x in (q, k, u, v)), r]


def results(function, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    o = function(*tensors)
    return [o, *torch.autograd.grad(o, tensors, grad.to(o.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accuracy_rule(dtype):
    """Maximum and RMS error against float64 at most twice those of the unfused eager path in the same dtype."""
    ours = inputs(dtype)
    grad = torch.randn(ours[0].shape, device="cuda").to(dtype)

    def eager(q, k, u, v, r):
        return flash_mhf_reference(q, k, u, v, r.to(q.dtype))

    exact = results(flash_mhf_reference, [x.detach().double().requires_grad_() for x in ours], grad)
    fused, plain = results(flash_mhf, ours, grad), results(eager, ours, grad)
    for name, a, b, reference in zip(["o", "dq", "dk", "du", "dv", "dr"], fused, plain, exact, strict=True):
        ours_error, eager_error = a.double() - reference, b.double() - reference
        assert ours_error.abs().max() <= 2 * eager_error.abs().max(), name
        assert ours_error.square().mean().sqrt() <= 2 * eager_error.square().mean().sqrt(), name


def test_compiled_layer_under_autocast_equals_eager():
    torch.manual_seed(0)
    layer = FlashMHF(256, 4, 4, 96, device="cuda")
    x = torch.randn(2, 128, 256, device="cuda", requires_grad=True)

    def run(function):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = function(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    for a, b in zip(run(layer), run(torch.compile(layer, fullgraph=True)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2 * a.float().abs().max().item())


def test_peak_memory_does_not_hold_the_intermediate():
    """Forward and backward at 65,536 tokens, d_ff 2048, 4 heads: one [T, H, d_ff] tensor in bf16 is 1 GiB."""
    tensors = [
        torch.randn(1, 65536, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_(),
        *(torch.randn(4, 8, 256, 64, device="cuda", dtype=torch.bfloat16).mul(0.1).requires_grad_() for _ in range(3)),
        torch.rand(1, 65536, 4, 8, device="cuda").requires_grad_(),
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_mhf(*tensors).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_a_small_model_learns_in_bf16():
    torch.manual_seed(0)
    ffn = FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=64)
    model = Decoder(DecoderConfig(vocab_size=64, d_model=64, num_layers=2, num_attention_heads=2, ffn=ffn)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    tokens = torch.randint(64, (4, 65), device="cuda")
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            sums = model(tokens[:, :-1], tokens[:, 1:])
        loss = sums.nll / sums.num_tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.5
