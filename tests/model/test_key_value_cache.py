"""Prefill and single steps give what one uncached forward gives, for every variant, padded or not; drawing tokens."""

import pytest
import torch
from test_zoo import OPTIONS

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.model.ffn import FFN_VARIANTS
from mhf_lightning.model.generate import Generation, draw, generate


def build(name: str, **changes) -> Decoder:
    torch.manual_seed(0)
    config = {"vocab_size": 61, "d_model": 32, "num_layers": 2, "num_attention_heads": 4, **changes}
    decoder = Decoder(DecoderConfig(ffn=FFNConfig(name=name, **OPTIONS[name]), **config)).eval()
    for parameter in decoder.parameters():  # far from the initialisation, where logits would be almost equal
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FFN_VARIANTS)
@torch.no_grad()
def test_steps_equal_the_uncached_forward(name, tied, kv_heads):
    decoder = build(name, tie_embeddings=tied, num_kv_heads=kv_heads)
    lengths, new = [1, 7, 4], 5
    rows = [torch.randint(61, (length + new,)) for length in lengths]
    expected = [decoder(row[None])[0] for row in rows]
    generation = Generation(decoder, 3, max(lengths) + new)
    for _ in range(2):  # and again: nothing of the first time is left
        logits = generation.prefill([row[:length] for row, length in zip(rows, lengths, strict=True)])
        for step in range(new + 1):
            for i, length in enumerate(lengths):
                torch.testing.assert_close(logits[i], expected[i][length + step - 1], rtol=1e-5, atol=1e-5)
            if step < new:
                tokens = [row[length + step] for row, length in zip(rows, lengths, strict=True)]
                logits = generation.step(torch.stack(tokens))


def test_greedy_generation_equals_repeated_forwards():
    decoder = build("flash_mhf")
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9])]
    new = torch.stack(list(generate(decoder, prompts, 12, temperature=0.0)))
    for column, prompt in zip(new.T, prompts, strict=True):
        ids = prompt
        for _ in range(12):
            ids = torch.cat((ids, decoder(ids[None])[0, -1].argmax(-1, keepdim=True)))
        assert column.tolist() == ids[len(prompt) :].tolist()


def test_a_sequence_that_ends_is_filled_up_while_others_go_on():
    decoder = build("swiglu")
    prompts = [torch.tensor([token]) for token in range(61)]
    free = torch.stack(list(generate(decoder, prompts, 10, temperature=0.0))).T.tolist()
    stop = next(row[0] for row in free if row[1] != row[0])  # after which the first of them would say something else
    ends = [row.index(stop) if stop in row else 9 for row in free]
    early, late = free[ends.index(0)], free[ends.index(max(ends))]
    assert early[1] != stop
    assert max(ends) > 2
    pair = [prompts[free.index(early)], prompts[free.index(late)]]
    stopped = torch.stack(list(generate(decoder, pair, 10, temperature=0.0, stop_id=stop))).T.tolist()
    assert stopped[0] == [stop] * (max(ends) + 1)
    assert stopped[1] == late[: max(ends) + 1]
    assert len(list(generate(decoder, pair[:1], 10, temperature=0.0, stop_id=stop))) == 1


def test_the_generator_alone_decides():
    decoder = build("pkv")
    state = torch.get_rng_state()

    def run(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(t) for t in generate(decoder, [torch.tensor([1])], 20, temperature=1.0, generator=generator)]

    assert run(3) == run(3) != run(4)
    assert torch.equal(state, torch.get_rng_state())


def test_drawing_keeps_to_the_nucleus_and_the_temperature():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    counts = draw(logits, 1.0, 0.6, generator).bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), rtol=0, atol=0.03)
    counts = draw(logits, 0.5, 1.0, generator).bincount(minlength=4) / 4000
    squared = torch.tensor([0.5, 0.3, 0.15, 0.05]).square()
    torch.testing.assert_close(counts, squared / squared.sum(), rtol=0, atol=0.03)
    assert draw(logits, 0.0, 1.0).unique().tolist() == [0]
    assert draw(logits, 1.0, 1e-6, generator).unique().tolist() == [0]


def test_the_lowest_temperature_is_the_most_likely_token():
    assert draw(torch.tensor([[1.0, 3.0, 2.0]]), 1e-40, 0.9).tolist() == [1]


@pytest.mark.parametrize(("temperature", "top_p"), [(-0.1, 0.9), (1.0, 0.0), (1.0, 1.1)])
def test_options_out_of_range_are_refused(temperature, top_p):
    with pytest.raises(ValueError, match=f"temperature is {temperature} and top_p {top_p}"):
        draw(torch.zeros(1, 3), temperature, top_p)


def test_prompts_that_cannot_be_read_are_refused():
    generation = Generation(build("swiglu"), 2, 4)
    with pytest.raises(ValueError, match="holds no token"):
        generation.prefill([torch.tensor([1]), torch.tensor([], dtype=torch.int64)])
    with pytest.raises(ValueError, match="has 5 tokens; there is room for 4"):
        generation.prefill([torch.tensor([1]), torch.arange(5)])
