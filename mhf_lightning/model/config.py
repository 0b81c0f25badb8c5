"""Configuration of the decoder and of its feed-forward layers: plain dataclasses, no torch and no Lightning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Optional, get_args

FFNName = Literal["swiglu", "gated_swiglu", "mh_ffn", "pkv", "dense_moe", "flash_mhf"]
InitializationName = Literal["paper", "variance_matched"]
GateName = Literal["sigmoid", "softmax"]


@dataclass
class InitGainsConfig:
    """Overrides of single scales of a FlashMHF initialisation; ``None`` keeps the named scheme's value.

    Attributes:
        linear_gain: Xavier-uniform gain of W_in and W_out.
        k_std: Standard deviation of K.
        u_std: Standard deviation of U.
        v_std: Standard deviation of V.
        router_std: Standard deviation of the router weight.
    """

    linear_gain: Optional[float] = None  # noqa: UP045 - the CLI evaluates annotations, also on Python 3.10
    k_std: Optional[float] = None  # noqa: UP045
    u_std: Optional[float] = None  # noqa: UP045
    v_std: Optional[float] = None  # noqa: UP045
    router_std: Optional[float] = None  # noqa: UP045


@dataclass
class FFNConfig:
    """The feed-forward layer: a variant by name, and the options that this variant takes (the others stay null).

    Attributes:
        name: Variant, one file each in ``mhf_lightning/model/ffn``.
        d_ff: Intermediate width (swiglu, mh_ffn; for pkv the number of learned key-value pairs per head).
        num_heads: Number of FFN heads H, a divisor of d_model (mh_ffn, pkv, flash_mhf).
        num_subnetworks: Number of sub-networks E per head (gated_swiglu, dense_moe, flash_mhf).
        d_e: Width of one sub-network; d_ff = num_subnetworks * d_e (gated_swiglu, dense_moe, flash_mhf).
        num_kuv_heads: Number of K/U/V heads, a divisor of num_heads; null means num_heads (flash_mhf).
        query_norm: RMSNorm of every query head; null means true (mh_ffn, pkv, dense_moe, flash_mhf).
        skip_linear: Leave out W_in and W_out; null means false (flash_mhf).
        gate: ``sigmoid``, the paper's, or ``softmax`` over the sub-networks; null means sigmoid (flash_mhf).
        recompute_queries: Compute Q again in the backward; null means false (flash_mhf).
        gains: Overrides of the initialisation's scales (flash_mhf).
    """

    name: FFNName = "flash_mhf"
    d_ff: Optional[int] = None  # noqa: UP045
    num_heads: Optional[int] = None  # noqa: UP045
    num_subnetworks: Optional[int] = None  # noqa: UP045
    d_e: Optional[int] = None  # noqa: UP045
    num_kuv_heads: Optional[int] = None  # noqa: UP045
    query_norm: Optional[bool] = None  # noqa: UP045
    skip_linear: Optional[bool] = None  # noqa: UP045
    gate: Optional[GateName] = None  # noqa: UP045
    recompute_queries: Optional[bool] = None  # noqa: UP045
    gains: Optional[InitGainsConfig] = None  # noqa: UP045

    def take(self, *, required: tuple[str, ...], optional: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the options of one variant, defaults filled in.

        Args:
            required: Options that the variant must be given.
            optional: Options that it may be given, with their defaults.

        Raises:
            ValueError: An option is missing, is not positive, or belongs to another variant.
        """
        optional = optional or {}
        allowed = (*required, *optional)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        foreign = [key for key, value in values.items() if value is not None and key not in allowed]
        if foreign:
            raise ValueError(
                f"ffn: {', '.join(foreign)} given, but {self.name!r} takes only {', '.join(allowed)}; "
                f"remove the others or set them to null"
            )
        missing = [key for key in required if values[key] is None]
        if missing:
            raise ValueError(f"ffn: {self.name!r} needs {', '.join(required)}; missing: {', '.join(missing)}")
        for key in allowed:
            if isinstance(values[key], int) and not isinstance(values[key], bool) and values[key] <= 0:
                raise ValueError(f"ffn.{key} is {values[key]}; it must be a positive integer")
        return {key: optional.get(key) if values[key] is None else values[key] for key in allowed}


@dataclass
class DecoderConfig:
    """A Llama-like decoder: pre-RMSNorm, RoPE, causal attention, and a feed-forward layer chosen by name.

    Attributes:
        vocab_size: Rows of the embedding; at least the tokenizer's vocabulary.
        d_model: Width of the residual stream.
        num_layers: Number of blocks.
        num_attention_heads: Number of attention heads, a divisor of d_model.
        num_kv_heads: Number of key/value heads of the attention (grouped-query); null means num_attention_heads.
        ffn: The feed-forward layer of every block.
        rope_theta: Base of the rotary embedding.
        norm_eps: Epsilon of every RMSNorm.
        tie_embeddings: Use the embedding as the output head.
        dropout: Probability of dropping an element of a sub-layer's output before the residual addition.
        initialization: ``paper`` (the released values) or ``variance_matched`` (every FFN starts at SwiGLU's scale).
    """

    vocab_size: int = 4096
    d_model: int = 256
    num_layers: int = 4
    num_attention_heads: int = 4
    num_kv_heads: Optional[int] = None  # noqa: UP045
    ffn: FFNConfig = field(default_factory=FFNConfig)
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dropout: float = 0.0
    initialization: InitializationName = "variance_matched"

    def __post_init__(self) -> None:
        for key in ("vocab_size", "d_model", "num_layers", "num_attention_heads"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be a positive integer")
        heads = self.num_attention_heads
        if self.d_model % heads or (self.d_model // heads) % 2:
            raise ValueError(
                f"d_model is {self.d_model}, num_attention_heads is {heads}: d_model must be a multiple of "
                f"2 * num_attention_heads (rotary embeddings pair up the elements of a head)"
            )
        kv_heads = self.num_kv_heads
        if kv_heads is not None and (kv_heads <= 0 or heads % kv_heads):
            raise ValueError(f"num_kv_heads is {kv_heads}; it must divide num_attention_heads, which is {heads}")
        if self.ffn.num_heads and self.d_model % self.ffn.num_heads:
            raise ValueError(
                f"d_model is {self.d_model}, ffn.num_heads is {self.ffn.num_heads}: d_model must be a multiple of it"
            )
        if self.initialization not in get_args(InitializationName):
            names = ", ".join(get_args(InitializationName))
            raise ValueError(f"initialization is {self.initialization!r}; it must be one of {names}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain, nested dictionaries (what a checkpoint stores)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Undo :meth:`to_dict`.

        Raises:
            TypeError: A key is unknown.
            ValueError: A value is out of range.
        """
        ffn = dict(values["ffn"])
        gains = ffn.get("gains")
        return cls(**{**values, "ffn": FFNConfig(**{**ffn, "gains": gains and InitGainsConfig(**gains)})})
