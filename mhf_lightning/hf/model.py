"""The decoder as a transformers model: configuration, forward with transformers' cache, and `generate`."""

from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from mhf_lightning.model import Decoder, DecoderConfig


class FlashMHFConfig(PreTrainedConfig):
    """The fields of :class:`~mhf_lightning.model.DecoderConfig` under its names, readable under transformers' too.

    ``ffn`` is a dictionary; ``num_kv_heads`` is always a number here. ``max_position_embeddings`` is the length of the
    blocks that the model was trained on; nothing in the model depends on it.
    """

    model_type = "flash_mhf"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "num_kv_heads",
        "rms_norm_eps": "norm_eps",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    vocab_size: int = 4096
    d_model: int = 256
    num_layers: int = 4
    num_attention_heads: int = 4
    num_kv_heads: Optional[int] = None  # noqa: UP045 - evaluated, also on Python 3.10
    ffn: Optional[dict] = None  # noqa: UP045
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    initialization: str = "variance_matched"
    max_position_embeddings: int = 2048
    use_cache: bool = True
    bos_token_id: Optional[int] = None  # noqa: UP045
    eos_token_id: Optional[int] = None  # noqa: UP045
    pad_token_id: Optional[int] = None  # noqa: UP045

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what depends on other fields."""
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_attention_heads
        if self.ffn is None:
            self.ffn = {"name": "flash_mhf", "num_heads": 4, "num_subnetworks": 4, "d_e": 192}
        super().__post_init__(**kwargs)

    @classmethod
    def from_decoder(cls, config: DecoderConfig, **others: Any) -> "FlashMHFConfig":
        """Convert a decoder's configuration; ``others`` are fields that it does not have."""
        values = config.to_dict()
        tied, ffn = values.pop("tie_embeddings"), values.pop("ffn")
        return cls(
            **values,
            ffn={key: value for key, value in ffn.items() if value is not None},
            tie_word_embeddings=tied,
            **others,
        )

    def to_decoder(self) -> DecoderConfig:
        """Convert to a decoder's configuration.

        Raises:
            TypeError: A key of ``ffn`` is unknown.
            ValueError: A value is out of range.
        """
        own = (
            *("vocab_size", "d_model", "num_layers", "num_attention_heads", "num_kv_heads", "ffn"),
            *("rope_theta", "norm_eps", "dropout", "initialization"),
        )
        return DecoderConfig.from_dict(
            {**{key: getattr(self, key) for key in own}, "tie_embeddings": self.tie_word_embeddings}
        )


class FlashMHFForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`~mhf_lightning.model.Decoder`, of any feed-forward variant, as a causal language model."""

    config_class = FlashMHFConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 - transformers' own types
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: FlashMHFConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config.to_decoder())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights as the decoder does; transformers keeps it from those that were loaded."""
        if isinstance(module, Decoder):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with ``labels`` the mean loss of predicting each next token.

        Args:
            input_ids: ``[B, L]``, int64.
            attention_mask: ``[B, L so far]``, 0 where there is padding (left padding for generation).
            position_ids: ``[B, L]``; by default those after what the cache holds.
            cache: Keys and values of earlier tokens.
            labels: ``[B, L]``, the input itself, -100 where a token is not to be predicted.
            use_cache: Make a cache where none is given; by default the configuration's, but not in training.
            logits_to_keep: Only the last so many positions, or those of these indices; 0 is all.
            kwargs: For the loss, such as ``num_items_in_batch``.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + past)[None]
        mask = create_causal_mask(
            config=self.config,
            # Only its shape, dtype and device are read.
            inputs_embeds=torch.empty(*input_ids.shape, 0, dtype=self.dtype, device=input_ids.device),
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        hidden = self.model.hidden(input_ids, position_ids, mask, cache)
        logits = self.model.head(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
