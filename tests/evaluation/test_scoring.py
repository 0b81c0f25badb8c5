"""Scores against plain forwards, perplexity against arithmetic, windows against lm-eval's."""

import math
from dataclasses import replace

import pytest
import torch
from extras import need
from made_run import CONTEXT, VOCAB, build, make_run
from tokenizers import Tokenizer, models, pre_tokenizers

from mhf_lightning.checkpoint.trained import read_trained, read_vocabulary
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.sources import Document
from mhf_lightning.evaluation.perplexity import TextLoss, text_losses
from mhf_lightning.evaluation.scoring import score, windows


@pytest.fixture
def vocabulary(made_run):
    return read_vocabulary(read_trained(made_run))


@torch.no_grad()
def log_likelihoods(decoder, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, by one forward."""
    logits = decoder(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_single_forwards(batch_size):
    decoder = build()
    torch.manual_seed(1)
    sequences = [(torch.randint(VOCAB, (length,)).tolist(), count) for length, count in
                 [(5, 4), (2, 1), (20, 3), (20, 19), (9, 1), (3, 2), (14, 7)]]  # fmt: skip
    for i in (2, 5):  # two that greedy decoding gives
        ids, count = sequences[i]
        for position in range(len(ids) - count, len(ids)):
            ids[position] = int(decoder(torch.tensor([ids[:position]]))[0, -1].argmax())
    scored = score(decoder, sequences, batch_size)
    for one, (ids, count) in zip(scored, sequences, strict=True):
        assert one.log_likelihood == pytest.approx(float(log_likelihoods(decoder, ids)[-count:].sum()), rel=1e-5)
    assert [one.is_greedy for one in scored] == [False, False, True, False, False, True, False]


def test_windows_are_those_of_lm_eval():
    """The example in lm-eval's own documentation, with a prefix and a context of 4."""
    assert windows(11, 4, 4) == [(0, 5, 4), (4, 9, 4), (6, 11, 2)]
    need("lm_eval")
    import lm_eval.utils as lm_eval

    for length in range(2, 30):
        tokens = list(range(1, length))
        theirs = lm_eval.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=4, context_len=1)
        ours = [(list(range(start, end)), count) for start, end, count in windows(length, 4, 4)]
        expected = []
        for (context, predicted), (whole, _) in zip(map(lm_eval.make_disjoint_window, theirs), ours, strict=True):
            assert [*context, *predicted] == whole
            expected.append((whole, len(predicted)))
        assert ours == expected


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 40])
def test_every_token_is_scored_once_with_as_much_context_as_the_stride_leaves(length, stride):
    context, scored = 8, []
    for start, end, count in windows(length, context, stride):
        assert end - 1 - start <= context
        for target in range(end - count, end):
            scored.append(target)
            assert target - start >= min(target, context - stride + 1)
    assert scored == list(range(1, length))
    assert windows(1, context, stride) == []


def uniform(made_corpus, tmp_path):
    """A model that finds every token equally likely."""
    decoder = build(tie_embeddings=False)
    torch.nn.init.zeros_(decoder.head.weight)
    return decoder, read_vocabulary(read_trained(make_run(tmp_path / "uniform", decoder, made_corpus)))


def test_the_perplexity_of_knowing_nothing_is_the_vocabulary(made_corpus, tmp_path):
    decoder, vocabulary = uniform(made_corpus, tmp_path)
    documents = [Document("naïve " * 40, "a"), Document("", "b"), Document("x = 1\n", "c")]
    losses = list(text_losses(decoder, vocabulary, documents, stride=CONTEXT, batch_size=2))
    assert [loss.origin for loss in losses] == ["a", "c"]
    assert losses[0].bytes == 7 * 40
    assert losses[1].tokens == len(vocabulary.tokenizer.encode("x = 1\n").ids)
    total = TextLoss.total("all", losses)
    figures = total.figures()
    assert figures["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    assert figures["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(total.tokens * math.log2(VOCAB) / (280 + 6), rel=1e-6)


def test_tokens_count_the_same_in_long_and_short_documents():
    parts = [TextLoss("long", 30.0, 30, 60), TextLoss("short", 10.0, 2, 4)]
    assert TextLoss.total("all", parts).figures()["loss"] == pytest.approx(40 / 32)
    assert parts[1].figures()["perplexity"] == pytest.approx(math.exp(5))
    assert TextLoss("worst", 1e6, 1, 1).figures()["perplexity"] == math.inf


@pytest.mark.parametrize("stride", [1, 10, CONTEXT])
def test_a_sliding_window_scores_each_token_in_its_context(vocabulary, stride):
    decoder = build()
    text = "def load(fp, *, cls=None, object_hook=None):\n    return loads(fp.read())\n" * 3
    ids = [0, *vocabulary.tokenizer.encode(text).ids]
    assert len(ids) > 2 * CONTEXT
    expected = 0.0
    for position in range(1, len(ids)):
        # The first window scores all it can; later ones begin so that they end a stride further on.
        over = max(0, position - CONTEXT)
        end = CONTEXT + 1 + -(-over // stride) * stride if over else CONTEXT + 1
        start = max(0, min(end, len(ids)) - CONTEXT - 1)
        expected -= float(log_likelihoods(decoder, ids[start : position + 1])[-1])
    (loss,) = text_losses(decoder, vocabulary, [Document(text, "x")], stride=stride, batch_size=4)
    assert loss.tokens == len(ids) - 1
    assert loss.nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [0, CONTEXT + 1])
def test_a_stride_out_of_range_is_refused(vocabulary, stride):
    with pytest.raises(ValueError, match=f"stride is {stride}; it must be between 1 and the context, {CONTEXT}"):
        list(text_losses(build(), vocabulary, [Document("x", "x")], stride=stride, batch_size=1))


def test_more_documents_than_a_group_keep_their_order(vocabulary):
    documents = [Document(f"x{i} = {i}" * (i % 7 + 1), str(i)) for i in range(150)]
    losses = list(text_losses(build(), vocabulary, documents, stride=CONTEXT, batch_size=16))
    assert [loss.origin for loss in losses] == [str(i) for i in range(150)]
    (alone,) = text_losses(build(), vocabulary, documents[101:102], stride=CONTEXT, batch_size=1)
    assert losses[101].nll == pytest.approx(alone.nll, rel=1e-5)


def test_a_text_that_spells_the_end_of_documents_is_refused(vocabulary):
    words = Tokenizer(models.WordLevel({"end": 0, "a": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    spelling = replace(vocabulary, tokenizer=words, eos_token="end", eos_id=0)
    with pytest.raises(DataError, match=r"turns text into its EOS token 'end', in a document that begins 'a end a'"):
        list(text_losses(build(), spelling, [Document("a end a", "x")], stride=CONTEXT, batch_size=1))
