"""Perplexity of texts: token-weighted over all and for each document, with bits per byte to compare tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from mhf_lightning.checkpoint.trained import Vocabulary
from mhf_lightning.data.sources import Document
from mhf_lightning.data.tokenizer import encode_documents
from mhf_lightning.evaluation.scoring import score, windows
from mhf_lightning.model import Decoder

_GROUP = 64  # documents that are sorted by length together


@dataclass(frozen=True)
class TextLoss:
    """Summed negative log-likelihood (nats) of text.

    Attributes:
        origin: Where the text came from.
        nll: Of all its tokens; the first is given the token that ends documents, which is not scored itself.
        tokens: How many those are.
        bytes: Of the text in UTF-8.
    """

    origin: str
    nll: float
    tokens: int
    bytes: int

    @classmethod
    def total(cls, origin: str, parts: list[TextLoss]) -> TextLoss:
        """Sum over documents: every token counts the same."""
        return cls(
            origin,
            math.fsum(part.nll for part in parts),
            sum(part.tokens for part in parts),
            sum(part.bytes for part in parts),
        )

    def figures(self) -> dict[str, float]:
        """Return loss in nats per token, perplexity, and bits per byte.

        Bits per byte do not depend on how text is cut into tokens.
        """
        loss = self.nll / self.tokens
        bits = self.nll / math.log(2) / self.bytes
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": bits,
        }


def text_losses(
    decoder: Decoder, vocabulary: Vocabulary, documents: Iterable[Document], *, stride: int, batch_size: int
) -> Iterator[TextLoss]:
    """Score documents, each by itself; empty ones are left out.

    Args:
        decoder: In evaluation mode.
        vocabulary: Its tokenizer and context.
        documents: Of any length; one longer than the context is read in windows.
        stride: Tokens that a window scores, as :func:`~mhf_lightning.evaluation.scoring.windows`.
        batch_size: Windows of a forward.

    Raises:
        ValueError: ``stride`` is not between 1 and the context.
        DataError: A text spells the token that ends documents.
    """
    context = vocabulary.context_length
    if not 1 <= stride <= context:
        raise ValueError(f"stride is {stride}; it must be between 1 and the context, {context}")
    remaining = iter(documents)
    while group := list(islice(remaining, _GROUP)):
        sequences: list[tuple[list[int], int]] = []
        owners: list[int] = []
        tokens, lengths = encode_documents(vocabulary.tokenizer, [one.text for one in group], vocabulary.eos_id)
        ends = lengths.cumsum()
        for owner, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
            ids = [vocabulary.eos_id, *tokens[end - length : end - 1].tolist()]
            for start, stop, count in windows(len(ids), context, stride):
                sequences.append((ids[start:stop], count))
                owners.append(owner)
        nll = [0.0] * len(group)
        for owner, scored in zip(owners, score(decoder, sequences, batch_size), strict=True):
            nll[owner] -= scored.log_likelihood
        for document, loss, length in zip(group, nll, lengths.tolist(), strict=True):
            if length > 1:
                yield TextLoss(document.origin, loss, length - 1, len(document.text.encode()))
