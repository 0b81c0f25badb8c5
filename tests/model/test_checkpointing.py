"""Activation checkpointing: the same gradients, what is computed again, and what is kept."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.model.checkpointing import KEPT_OPS, check_mode

FFN = {
    "flash_mhf": FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=16),
    "swiglu": FFNConfig("swiglu", d_ff=48),
}
LAYERS = 2


def gradients(ffn: str, mode: str, *, dropout: float = 0.0, compiled: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=50, d_model=32, num_layers=LAYERS, num_attention_heads=2, ffn=FFN[ffn], dropout=dropout
    )
    decoder = Decoder(config)
    for block in decoder.blocks:
        block.activation_checkpointing = mode
        if compiled:
            block.compile(fullgraph=True)
    tokens = torch.randint(50, (2, 9))
    decoder(tokens[:, :-1], tokens[:, 1:]).nll.backward()
    return {key: p.grad for key, p in decoder.named_parameters()}


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ffn", FFN)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_are_bitwise_the_same_with_dropout(ffn, mode):
    plain, checkpointed = gradients(ffn, "none", dropout=0.3), gradients(ffn, mode, dropout=0.3)
    for key, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[key]), key


@pytest.mark.parametrize(("mode", "kept_calls", "more_products"), [("none", 1, 0), ("full", 2, 5), ("selective", 1, 5)])
def test_what_is_computed_again(mode, kept_calls, more_products):
    """Selective runs FlashMHF's op and attention once, full runs them twice; both run five of six projections twice.

    The sixth is W_out, the last thing in a block: the backward does not want its output.
    """
    with CountOps() as none:
        gradients("flash_mhf", "none")
    with CountOps() as count:
        gradients("flash_mhf", mode)
    used = [op for op in KEPT_OPS if count.calls[op]]
    assert torch.ops.mhf.flash_mhf_routed.default in used
    assert len(used) == 2  # and one of the attention kernels
    assert {count.calls[op] for op in used} == {kept_calls * LAYERS}
    mm = torch.ops.aten.mm.default
    assert count.calls[mm] - none.calls[mm] == more_products * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_each_mode_compiles_without_a_graph_break(mode):
    torch._dynamo.reset()
    plain, compiled = gradients("flash_mhf", "none"), gradients("flash_mhf", mode, compiled=True)
    for key, gradient in plain.items():
        torch.testing.assert_close(compiled[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_nothing_is_kept_without_gradients():
    decoder = Decoder(DecoderConfig(vocab_size=50, d_model=32, num_layers=1, num_attention_heads=2, ffn=FFN["swiglu"]))
    decoder.blocks[0].activation_checkpointing = "selective"
    with torch.no_grad():
        assert decoder(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 50)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="none, full, selective"):
        check_mode("some")
