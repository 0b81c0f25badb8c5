"""Sampling: known distributions, the stop token, the context window."""

import torch

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.model.generate import sample


class Successor(Decoder):
    """A decoder that is sure that token i is followed by i + 1, and records how much it saw."""

    def __init__(self) -> None:
        super().__init__(
            DecoderConfig(vocab_size=11, d_model=8, num_layers=1, num_attention_heads=2, ffn=FFNConfig("swiglu", 8))
        )
        self.lengths: list[int] = []

    def forward(self, input_ids, labels=None, *, position_ids=None, document_ids=None):
        self.lengths.append(input_ids.shape[1])
        return 20.0 * torch.nn.functional.one_hot((input_ids + 1) % 11, 11).float()


def test_follows_the_model_and_respects_context_and_stop():
    model = Successor()
    new = sample(model, torch.tensor([3]), 20, max_context=4, top_p=0.9, stop_id=0)
    assert new.tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert max(model.lengths) == 4


def test_is_a_function_of_its_generator():
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(vocab_size=50, d_model=8, num_layers=1, num_attention_heads=2, ffn=FFNConfig("swiglu", 8))
    ).eval()

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return sample(model, torch.tensor([1, 2]), 12, max_context=8, generator=generator).tolist()

    state = torch.get_rng_state()
    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(state, torch.get_rng_state())
