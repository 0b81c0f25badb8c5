"""Continuing token sequences with a decoder: prefill, then one token at a time from a key/value cache. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mhf_lightning.model.transformer import Decoder


class Generation:
    """A batch of sequences under way: how far each is, and the keys and values of its tokens.

    Everything is allocated once and changed in place, so every :meth:`step` has the same shapes and can be compiled, or
    captured as a CUDA graph. It computes in the dtype of the weights.

    Args:
        decoder: In evaluation mode.
        batch_size: Sequences, B.
        max_length: Room for a sequence, prompt and new tokens together.
    """

    def __init__(self, decoder: Decoder, batch_size: int, max_length: int) -> None:
        config, weight = decoder.config, decoder.embedding.weight
        kv_heads = config.num_kv_heads or config.num_attention_heads
        d_head = config.d_model // config.num_attention_heads
        self.decoder = decoder
        # All layers one after the other: [B, kv_heads, num_layers * max_length, d_head].
        self.keys = weight.new_zeros(batch_size, kv_heads, config.num_layers * max_length, d_head)
        self.values = torch.zeros_like(self.keys)
        self.padding = torch.zeros(batch_size, 1, dtype=torch.int64, device=weight.device)  # before each prompt
        self._all_slots = torch.arange(max_length, device=weight.device)
        self._first_slots = torch.arange(config.num_layers, device=weight.device) * max_length
        self.slots = self._first_slots.clone()  # of the next token, in each layer
        self._is_prefill = False

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read the prompts, in place of anything read before.

        Args:
            prompts: B times ``[any length]``, int64, at least one token each.

        Returns:
            Logits of what follows each, ``[B, vocab_size]``.

        Raises:
            ValueError: A prompt is empty, or there is no room for it.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest, room = max(lengths), len(self._all_slots)
        if min(lengths) == 0:
            raise ValueError("a prompt holds no token; give it at least one, such as the one that ends documents")
        if longest > room:
            raise ValueError(f"a prompt has {longest} tokens; there is room for {room}")
        device = self.slots.device
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        for row, prompt in zip(ids, prompts, strict=True):
            row[longest - len(prompt) :] = prompt
        self.padding.copy_(longest - torch.tensor(lengths, device=device)[:, None])
        slots = self._all_slots[:longest]
        mask = None
        if min(lengths) < longest:
            is_token = slots >= self.padding[:, :, None, None]  # [B, 1, 1, L]
            # A padding position sees itself: a softmax over nothing would spread NaN.
            mask = (slots <= slots[:, None]) & is_token | (slots == slots[:, None])
        self._is_prefill = True
        hidden = self.decoder.hidden(ids, (slots - self.padding).clamp_min(0), mask, self)
        self._is_prefill = False
        self.slots.copy_(self._first_slots + longest)
        return self.decoder.head(hidden[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of every sequence, ``[B]``, int64; return the logits of what follows, as ``prefill``."""
        slot = self.slots[:1]
        seen = (self._all_slots <= slot) & (self._all_slots >= self.padding)  # [B, slots]
        hidden = self.decoder.hidden(tokens[:, None], slot - self.padding, seen[:, None, None], self)
        self.slots += 1
        return self.decoder.head(hidden[:, -1])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take in a layer's keys and values; the decoder calls it, as a cache."""
        room = len(self._all_slots)
        keys, values = (kept.narrow(2, layer_idx * room, room) for kept in (self.keys, self.values))
        if self._is_prefill:
            length = key_states.shape[2]
            keys[:, :, :length], values[:, :, :length] = key_states, value_states
            return key_states, value_states  # nothing was there before
        slot = self.slots[layer_idx : layer_idx + 1]
        # Into the whole tensors: for a change of a part, torch.compile copies the part out and in again.
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        return keys, values


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue prompts of any lengths together, by nucleus sampling.

    Args:
        decoder: In evaluation mode.
        prompts: B times ``[any length]``, int64, at least one token each.
        max_new_tokens: How many tokens to add to each at most.
        temperature: As in :func:`draw`.
        top_p: As in :func:`draw`.
        stop_id: Ends a sequence, and fills it up while others go on.
        generator: As in :func:`draw`.

    Yields:
        The next token of each sequence, ``[B]``, on the CPU, until all have ended.

    Raises:
        ValueError: A prompt is empty, or an option is out of range.
    """
    generation = Generation(decoder, len(prompts), max(map(len, prompts)) + max_new_tokens)
    logits = generation.prefill(prompts)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for number in range(1, max_new_tokens + 1):
        tokens = draw(logits, temperature, top_p, generator)
        if stop_id is not None:
            tokens[ended] = stop_id
            ended |= tokens == stop_id
        yield tokens
        if number == max_new_tokens or ended.all():
            return
        logits = generation.step(tokens.to(logits.device))


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each row of logits.

    Args:
        logits: ``[B, vocab_size]``.
        temperature: Divides the logits; lower is closer to the most likely token, and 0 (or below 1e-6) is that token.
        top_p: Draw among the most likely tokens that hold this much probability.
        generator: Source of randomness, on the CPU; the global one is not touched when given.

    Returns:
        ``[B]``, int64, on the CPU.

    Raises:
        ValueError: ``temperature`` is negative, or ``top_p`` not in (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature is {temperature} and top_p {top_p}; they must be 0 or more, and in (0, 1]")
    logits = logits.float().cpu()
    if temperature < 1e-6:  # the quotients would overflow
        return logits.argmax(dim=-1)
    ordered, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
    return order.gather(-1, torch.multinomial(ordered, 1, generator=generator)).squeeze(-1)


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
    """Continue a prompt beyond the context of the model, which sees a window: no cache, so for short samples only.

    It only calls the decoder, so that one that is sharded over devices will do.

    Args:
        decoder: Maps tokens ``[1, L]`` to logits ``[1, L, vocab_size]``, in evaluation mode.
        prompt_ids: ``[L]``, int64, at least one token, on the model's device.
        num_tokens: How many tokens to add at most.
        max_context: How many of the last tokens the model sees (its training context).
        temperature: As in :func:`draw`.
        top_p: As in :func:`draw`.
        stop_id: Stop before this token (the end of a document).
        generator: As in :func:`draw`.

    Returns:
        The new tokens, ``[at most num_tokens]``, on the CPU.
    """
    ids = prompt_ids
    for _ in range(num_tokens):
        logits: Tensor = decoder(ids[None, -max_context:])
        token = draw(logits[:, -1], temperature, top_p, generator)
        if stop_id is not None and int(token) == stop_id:
            break
        ids = torch.cat((ids, token.to(ids.device)))
    return ids[len(prompt_ids) :].cpu()
