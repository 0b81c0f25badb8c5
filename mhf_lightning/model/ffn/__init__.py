"""The feed-forward variants: one file each, and one line each in ``FFN_VARIANTS``.

A variant is built from the decoder's configuration, maps ``[B, L, d_model]`` to ``[B, L, d_model]``, and has a
``reset_parameters`` that draws its weights as ``config.initialization`` says.
"""

from collections.abc import Callable

from torch import nn

from mhf_lightning.model.config import DecoderConfig
from mhf_lightning.model.ffn.dense_moe import DenseMoE
from mhf_lightning.model.ffn.flash_mhf import flash_mhf_from_config
from mhf_lightning.model.ffn.gated_swiglu import GatedSwiGLU
from mhf_lightning.model.ffn.mh_ffn import MultiHeadFFN
from mhf_lightning.model.ffn.pkv import ParametricKeyValue
from mhf_lightning.model.ffn.swiglu import SwiGLU

FFN_VARIANTS: dict[str, Callable[[DecoderConfig], nn.Module]] = {
    "swiglu": SwiGLU,
    "gated_swiglu": GatedSwiGLU,
    "mh_ffn": MultiHeadFFN,
    "pkv": ParametricKeyValue,
    "dense_moe": DenseMoE,
    "flash_mhf": flash_mhf_from_config,
}


def build_ffn(config: DecoderConfig) -> nn.Module:
    """Build the feed-forward layer that ``config.ffn.name`` names.

    Raises:
        ValueError: The name is unknown, or the options do not fit the variant.
    """
    if config.ffn.name not in FFN_VARIANTS:
        raise ValueError(f"ffn.name is {config.ffn.name!r}; it must be one of {', '.join(FFN_VARIANTS)}")
    return FFN_VARIANTS[config.ffn.name](config)
