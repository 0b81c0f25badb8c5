"""Activation checkpointing: the same gradients, what is computed again, and what is kept."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.model.checkpointing import ATTENTION_OPS, FFN_OPS, check_mode

FFN = {
    "flash_mhf": FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=16),
    "swiglu": FFNConfig("swiglu", d_ff=48),
}
LAYERS = 2


def gradients(
    ffn: str, mode: str, *, full: int = 0, dropout: float = 0.0, compiled: bool = False
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=50, d_model=32, num_layers=LAYERS, num_attention_heads=2, ffn=FFN[ffn], dropout=dropout
    )
    decoder = Decoder(config)
    decoder.set_activation_checkpointing(mode, full)
    for block in decoder.blocks:
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
@pytest.mark.parametrize("mode", ["full", "ffn", "selective"])
def test_gradients_are_bitwise_the_same_with_dropout(ffn, mode):
    plain, checkpointed = gradients(ffn, "none", dropout=0.3), gradients(ffn, mode, dropout=0.3)
    for key, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[key]), key


@pytest.mark.parametrize(
    ("mode", "full", "ffn_calls", "attention_calls", "more_products"),
    [
        ("none", 0, 2, 2, 0),
        ("selective", 0, 2, 2, 10),
        ("ffn", 0, 2, 4, 10),
        ("ffn", 1, 3, 4, 10),
        ("full", 0, 4, 4, 10),
        ("none", 1, 3, 3, 5),
    ],
)
def test_what_is_computed_again(mode, full, ffn_calls, attention_calls, more_products):
    """Calls of both blocks' ops; where a block is checkpointed, five of its six projections run twice.

    The sixth is W_out, the last thing in a block: the backward does not want its output.
    """
    with CountOps() as none:
        gradients("flash_mhf", "none")
    with CountOps() as count:
        gradients("flash_mhf", mode, full=full)
    assert sum(count.calls[op] for op in FFN_OPS) == ffn_calls
    assert sum(count.calls[op] for op in ATTENTION_OPS) == attention_calls
    mm = torch.ops.aten.mm.default
    assert count.calls[mm] - none.calls[mm] == more_products


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "ffn", "selective"])
def test_each_mode_compiles_without_a_graph_break(mode):
    torch._dynamo.reset()
    plain, compiled = gradients("flash_mhf", "none"), gradients("flash_mhf", mode, compiled=True)
    for key, gradient in plain.items():
        torch.testing.assert_close(compiled[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_nothing_is_kept_without_gradients():
    decoder = Decoder(DecoderConfig(vocab_size=50, d_model=32, num_layers=1, num_attention_heads=2, ffn=FFN["swiglu"]))
    decoder.set_activation_checkpointing("selective")
    with torch.no_grad():
        assert decoder(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 50)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="none, selective, ffn, full"):
        check_mode("some")
