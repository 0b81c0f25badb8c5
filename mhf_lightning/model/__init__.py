"""The model zoo: plain ``nn.Module`` code, no Lightning."""

from mhf_lightning.model.config import DecoderConfig, FFNConfig, InitGainsConfig
from mhf_lightning.model.transformer import Decoder, ParameterCount, count_parameters

__all__ = ["Decoder", "DecoderConfig", "FFNConfig", "InitGainsConfig", "ParameterCount", "count_parameters"]
