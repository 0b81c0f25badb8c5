"""Sampling text from a decoder, one token at a time; no key/value cache, so for short samples only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sample(
    decoder: Callable[[Tensor], Any],
    prompt_ids: Tensor,
    num_tokens: int,
    *,
    max_context: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a prompt by nucleus sampling.

    Args:
        decoder: Maps tokens ``[1, L]`` to logits ``[1, L, vocab_size]``, in evaluation mode.
        prompt_ids: ``[L]``, int64, at least one token, on the model's device.
        num_tokens: How many tokens to add at most.
        max_context: How many of the last tokens the model sees (its training context).
        temperature: Divides the logits; lower is closer to the most likely token.
        top_p: Sample among the most likely tokens that hold this much probability.
        stop_id: Stop before this token (the end of a document).
        generator: Source of randomness; the global one is not touched when given. On the CPU.

    Returns:
        The new tokens, ``[at most num_tokens]``, on the CPU.
    """
    ids = prompt_ids
    for _ in range(num_tokens):
        logits: Tensor = decoder(ids[None, -max_context:])
        probabilities = torch.softmax(logits[0, -1].float().cpu() / temperature, dim=-1)
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0.0
        token = order[torch.multinomial(ordered, 1, generator=generator)]
        if stop_id is not None and int(token) == stop_id:
            break
        ids = torch.cat((ids, token.to(ids.device)))
    return ids[len(prompt_ids) :].cpu()
