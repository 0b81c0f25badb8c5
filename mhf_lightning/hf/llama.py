"""What a Llama of transformers calls the parts of a decoder, and which Llamas the decoder can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from mhf_lightning.model import DecoderConfig, FFNConfig

_NAMES = {  # theirs: ours
    "model.embed_tokens.": "embedding.",
    "model.layers.": "blocks.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.": ".attention.",
    ".mlp.gate_proj.": ".ffn.gate.",
    ".mlp.up_proj.": ".ffn.up.",
    ".mlp.down_proj.": ".ffn.down.",
    ".mlp.": ".ffn.",
    "model.norm.": "final_norm.",
    "lm_head.": "head.",
}


def from_llama(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a Llama's weights as the decoder does."""
    return {_renamed(name, _NAMES): tensor for name, tensor in weights.items()}


def to_llama(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`from_llama`."""
    theirs = {ours: theirs for theirs, ours in _NAMES.items()}
    return {_renamed(name, theirs): tensor for name, tensor in weights.items()}


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def decoder_config(source: LlamaConfig) -> DecoderConfig:
    """Of a Llama, with its SwiGLU.

    Raises:
        ValueError: It has what the decoder has not.
    """
    rope: Any = source.rope_parameters
    wanted = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": source.hidden_size // source.num_attention_heads,
    }
    other = [f"{key} {getattr(source, key)}" for key, value in wanted.items() if getattr(source, key) != value]
    if rope.get("rope_type", "default") != "default":
        other.append(f"rope_type {rope['rope_type']}")
    if other:
        raise ValueError(f"this Llama has {', '.join(other)}, which the decoder of this package does not have")
    return DecoderConfig(
        vocab_size=source.vocab_size,
        d_model=source.hidden_size,
        num_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_kv_heads=source.num_key_value_heads,
        ffn=FFNConfig("swiglu", d_ff=source.intermediate_size),
        rope_theta=float(rope["rope_theta"]),
        norm_eps=source.rms_norm_eps,
        tie_embeddings=source.tie_word_embeddings,
    )
