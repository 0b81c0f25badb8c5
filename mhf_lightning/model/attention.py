"""Causal self-attention with rotary positions and optional grouped key/value heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhf_lightning.model.config import DecoderConfig
from mhf_lightning.model.rope import apply_rotary

# Takes keys (rotated) and values [B, kv_heads, L, d_head] into a cache; returns all of the layer that are to be seen.
ExtendCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CausalAttention(nn.Module):
    """Multi-head attention of a Llama block; no biases.

    Input and output are ``[B, L, d_model]``. With ``num_kv_heads < num_attention_heads`` several query heads share
    one key/value head (grouped-query attention).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_kv_heads or config.num_attention_heads
        self.d_head = config.d_model // self.num_heads
        d_kv = self.num_kv_heads * self.d_head
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, d_kv, bias=False)
        self.v_proj = nn.Linear(config.d_model, d_kv, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draw every matrix from a normal distribution of standard deviation 0.02."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=0.02)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, extend: ExtendCache | None = None
    ) -> Tensor:
        """Attend causally, or as ``mask`` says: boolean ``[B, 1, L, keys]``, True where a query may look.

        Without a mask, a cache must hold nothing yet, or the input be one token that sees all of it.
        """
        q = apply_rotary(self._heads(self.q_proj(x)), cos, sin)  # [B, heads, L, d_head]
        k = apply_rotary(self._heads(self.k_proj(x)), cos, sin)
        v = self._heads(self.v_proj(x))
        if extend is not None:
            k, v = extend(k, v)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and (extend is None or q.shape[2] == k.shape[2]),
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # all heads, or those of this tensor-parallel rank


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the mask that is causal and stays inside a document.

    Args:
        document_ids: ``[B, L]``, equal for positions of the same document.

    Returns:
        Boolean ``[B, 1, L, L]``; it costs B * L * L bytes once per forward, shared by all layers.
    """
    length = document_ids.shape[-1]
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
