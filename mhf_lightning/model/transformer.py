"""The decoder: embedding, blocks of attention and feed-forward layer, head, and the loss of a batch."""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhf_lightning.model.attention import CausalAttention, ExtendCache, document_mask
from mhf_lightning.model.checkpointing import ActivationCheckpointing, check_mode, checkpointed
from mhf_lightning.model.config import DecoderConfig
from mhf_lightning.model.ffn import build_ffn
from mhf_lightning.model.loss import LossSums, linear_cross_entropy_sums
from mhf_lightning.model.rope import rotary_tables


class KeyValueCache(Protocol):
    """Keys and values of the tokens so far: :class:`~mhf_lightning.model.generate.Generation`, or transformers'."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take in a layer's new keys and values ``[B, kv_heads, L, d_head]``; return all that it holds of the layer."""


class Block(nn.Module):
    """One layer: ``x + Attention(RMSNorm(x))``, then ``x + FFN(RMSNorm(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = CausalAttention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn: Any = build_ffn(config)  # an nn.Module with reset_parameters
        self.dropout = config.dropout
        self.activation_checkpointing: ActivationCheckpointing = "none"

    def reset_parameters(self) -> None:
        """Draw the weights of all parts."""
        self.attention_norm.reset_parameters()
        self.attention.reset_parameters()
        self.ffn_norm.reset_parameters()
        self.ffn.reset_parameters()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, extend: ExtendCache | None = None
    ) -> Tensor:
        """Apply the block to ``x [B, L, d_model]``; ``extend`` takes attention's keys and values into a cache."""
        if extend is not None:
            return self._sub_layers(x, cos, sin, mask, extend=extend)
        mode, dropout = self.activation_checkpointing, self.training and self.dropout > 0
        return checkpointed(self._sub_layers, mode, x, cos, sin, mask, dropout=dropout)

    def _sub_layers(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, extend: ExtendCache | None = None
    ) -> Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), cos, sin, mask, extend=extend))
        return x + self._drop(self.ffn(self.ffn_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Decoder(nn.Module):
    """A Llama-like language model whose feed-forward layer is chosen by name (``config.ffn.name``).

    Weights are drawn by :meth:`reset_parameters`, which the constructor calls unless the model is on the meta device.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_head()
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    def set_activation_checkpointing(self, mode: ActivationCheckpointing, fully_checkpointed_blocks: int = 0) -> None:
        """Say what blocks keep for the backward: so many of the first ones their input only, the others as ``mode``.

        Raises:
            ValueError: The mode is unknown, or there are not so many blocks.
        """
        check_mode(mode)
        if not 0 <= fully_checkpointed_blocks <= len(self.blocks):
            raise ValueError(
                f"fully_checkpointed_blocks is {fully_checkpointed_blocks}; it must be from 0 to the model's "
                f"{len(self.blocks)} blocks"
            )
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.activation_checkpointing = "full" if i < fully_checkpointed_blocks else mode

    def tie_head(self) -> None:
        """Make the embedding the output head, where the configuration says so; ``to_empty`` takes them apart."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights: embedding, head and attention with std 0.02, the FFN as its initialisation says."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.tie_head()
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=0.02)
        self.final_norm.reset_parameters()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor | LossSums:
        """Return logits, or with ``labels`` the sums that make the loss (the logits are then never whole).

        Args:
            input_ids: ``[B, L]``, int64.
            labels: ``[B, L]``, int64, the token after each position; below 0, as -100, where there is none.
            position_ids: ``[B, L]``, positions inside the document; by default 0 ... L - 1.
            document_ids: ``[B, L]``; where given, attention does not leave a document.

        Returns:
            Logits ``[B, L, vocab_size]``, or :class:`~mhf_lightning.model.loss.LossSums`.
        """
        mask = None if document_ids is None else document_mask(document_ids)
        x = self.hidden(input_ids, position_ids, mask)
        if labels is None:
            return self.head(x)
        return linear_cross_entropy_sums(x.flatten(0, 1), self.head.weight, labels.flatten())

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return what the head reads, ``[B, L, d_model]``.

        Args:
            input_ids: ``[B, L]``, int64.
            position_ids: ``[B, L]`` or ``[1, L]``; by default 0 ... L - 1.
            mask: Boolean ``[B, 1, L, keys]``, True where a position may look; None is causal.
            cache: Keys and values of earlier tokens, which those of these tokens join; for inference.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        d_head = self.config.d_model // self.config.num_attention_heads
        cos, sin = rotary_tables(position_ids, d_head, self.config.rope_theta)
        x = self.embedding(input_ids)  # [B, L, d_model]
        for layer_idx, block in enumerate(self.blocks):
            if cache is None:
                x = block(x, cos, sin, mask)
            else:
                x = block(x, cos, sin, mask, extend=partial(cache.update, layer_idx=layer_idx))
        return self.final_norm(x)


class ParameterCount(NamedTuple):
    """Number of parameters: all, and without the embedding and an untied head."""

    total: int
    non_embedding: int


def count_parameters(decoder: Decoder) -> ParameterCount:
    """Count the parameters of a decoder, shared ones once; works on the meta device."""
    total = sum(p.numel() for p in decoder.parameters())
    outside = decoder.embedding.weight.numel()
    if not decoder.config.tie_embeddings:
        outside += decoder.head.weight.numel()
    return ParameterCount(total, total - outside)
