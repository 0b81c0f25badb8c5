"""Log-likelihoods of token sequences under a decoder, in batches. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mhf_lightning.model import Decoder


class Scored(NamedTuple):
    """Of the scored tokens of a sequence: summed log-likelihood in nats, and whether greedy decoding gives them."""

    log_likelihood: float
    is_greedy: bool


@torch.no_grad()
def score(decoder: Decoder, sequences: Sequence[tuple[list[int], int]], batch_size: int) -> list[Scored]:
    """Score the last tokens of sequences, given all that stand before.

    Args:
        decoder: In evaluation mode.
        sequences: Token ids, and how many of the last to score: from 1 to all but the first.
        batch_size: Sequences of a forward; those of similar length come together.
    """
    device = decoder.embedding.weight.device
    scored: list[Scored | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = torch.zeros(len(rows), len(sequences[rows[0]][0]), dtype=torch.int64)
        for row, i in zip(ids, rows, strict=True):
            tokens, count = sequences[i]
            assert 1 <= count < len(tokens)
            row[: len(tokens)] = torch.tensor(tokens)  # padding on the right is seen by nothing before it
        ids = ids.to(device)
        hidden = decoder.hidden(ids[:, :-1])
        for row, i in enumerate(rows):  # one at a time, for the sake of the logits' size
            end, count = len(sequences[i][0]), sequences[i][1]
            logits = decoder.head(hidden[row, end - 1 - count : end - 1]).float()  # [count, vocab_size]
            targets = ids[row, end - count : end]
            nll = F.cross_entropy(logits, targets, reduction="none").double().sum()
            scored[i] = Scored(-float(nll), bool((logits.argmax(-1) == targets).all()))
    return [one for one in scored if one is not None]


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a sequence into windows such that each token but the first is scored once.

    Args:
        length: Tokens of the sequence, with the first one, which is only read.
        context: Tokens that the model reads at most.
        stride: Tokens that each window after the first scores, all others of it being context: ``context`` for windows
            that overlap in nothing that is scored or read, less for a sliding window.

    Returns:
        ``(start, end, count)``: score the last ``count`` tokens of ``[start, end)``.
    """
    cut: list[tuple[int, int, int]] = []
    done = 1
    while done < length:
        end = min(length, done + (stride if cut else context))
        cut.append((max(0, end - context - 1), end, end - done))
        done = end
    return cut
