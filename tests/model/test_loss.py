"""Head and cross-entropy in chunks: values and gradients against PyTorch's, memory, dtypes."""

import weakref
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mhf_lightning.model import loss
from mhf_lightning.model.loss import IGNORE_INDEX, linear_cross_entropy_sums

VOCAB = 50


def make(tokens=33, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 8, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, 8, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,))
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden, weight, targets):
    logits = F.linear(hidden, weight)
    log_z = logits.logsumexp(-1)[targets != IGNORE_INDEX]
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"), log_z.square().sum()


@pytest.mark.parametrize("chunk", [1, 7, 33, 1000])
def test_values_and_gradients_are_those_of_whole_logits(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk * VOCAB)
    hidden, weight, targets = make()
    sums, (nll, squared_log_z) = linear_cross_entropy_sums(hidden, weight, targets), plain(hidden, weight, targets)
    assert sums.num_tokens == (targets != IGNORE_INDEX).sum()
    torch.testing.assert_close(sums[:2], (nll, squared_log_z))
    for ours, truth in ((sums.nll, nll), (sums.nll / 7 + 0.1 * sums.squared_log_z, nll / 7 + 0.1 * squared_log_z)):
        found = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (ours, truth))
        torch.testing.assert_close(*found)


def test_without_any_target():
    hidden, weight, targets = make()
    sums = linear_cross_entropy_sums(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    assert [float(x) for x in sums] == [0, 0, 0]
    assert not any(grad.any() for grad in torch.autograd.grad(sums.nll, (hidden, weight)))


def test_every_target_below_zero_is_none_and_other_shapes_are_refused():
    hidden, weight, targets = make()
    others = torch.where(targets == IGNORE_INDEX, -1, targets)
    found = [linear_cross_entropy_sums(hidden, weight, x) for x in (targets, others)]
    assert found[0] == found[1]
    assert torch.autograd.grad(found[1].nll, hidden)[0][::5].abs().sum() == 0
    with pytest.raises(ValueError, match=r"targets are \[1\] for hidden \[33, 8\]"):
        linear_cross_entropy_sums(hidden, weight, targets[:1])


def test_large_logits_do_not_overflow():
    hidden, weight, targets = make(dtype=torch.float32)
    sums = linear_cross_entropy_sums(hidden * 1e3, weight, targets)
    torch.testing.assert_close(sums.nll, plain(hidden * 1e3, weight, targets)[0])
    assert torch.autograd.grad(sums.nll, weight)[0].isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_products_and_float32_sums(monkeypatch, autocast):
    """As close to float64 as whole logits in bfloat16; gradients in the dtype of their input."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 100 * VOCAB)
    hidden, weight, targets = make(2000)
    inputs = [x.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll = linear_cross_entropy_sums(*inputs, targets).nll
        by_torch = F.cross_entropy(F.linear(*inputs).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    assert nll.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = plain(*exact, targets)[0]
    assert abs(nll - truth) <= 2 * abs(by_torch - truth) + 1e-4 * truth
    grads, theirs = (torch.autograd.grad(x, inputs) for x in (nll, by_torch))
    for ours, other, expected in zip(grads, theirs, torch.autograd.grad(truth, exact), strict=True):
        assert ours.dtype == inputs[0].dtype
        assert (ours - expected).norm() <= 2 * (other - expected).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_one_chunk_exist_at_a_time(monkeypatch, dtype):
    """At most in two dtypes, which is when they are cast."""
    chunk = 1024 * 512

    class Largest(TorchDispatchMode):
        elements = alive = 0
        storages: ClassVar[dict[int, weakref.ref]] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
                if out.numel() == chunk:
                    self.storages[out.untyped_storage()._cdata] = weakref.ref(out)
                self.alive = max(self.alive, sum(x() is not None for x in self.storages.values()))
            return out

    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    hidden, weight = (torch.randn(n, 8, dtype=dtype, requires_grad=True) for n in (4096, 512))
    with Largest() as largest:
        linear_cross_entropy_sums(hidden, weight, torch.randint(512, (4096,))).nll.backward()
    assert largest.elements == chunk
    assert largest.alive == (1 if dtype == torch.float32 else 2)


def test_a_process_out_of_compiled_graphs_goes_on(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    on_gpu = [loss.fused.__wrapped__(function, "cuda") for function in (loss.log_z_and_picked, loss.logits_gradient)]
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            hidden, weight, targets = (x.detach() for x in make(dtype=dtype))
            inputs = hidden, weight, targets
            torch.testing.assert_close(on_gpu[0](*inputs), loss.log_z_and_picked(*inputs))
            inputs = hidden, weight, *torch.randn(3, 33).to(dtype), targets
            torch.testing.assert_close(on_gpu[1](*inputs), loss.logits_gradient(*inputs))


def test_a_second_derivative_is_refused():
    hidden, weight, targets = make()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy_sums(hidden, weight, targets).nll, hidden, create_graph=True)
