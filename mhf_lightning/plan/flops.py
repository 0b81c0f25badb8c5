"""Model FLOPs of a decoder, counted by torch's FlopCounterMode on the meta device. Torch and model/ only."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from mhf_lightning.model import Decoder, DecoderConfig


def flops_per_token(config: DecoderConfig, context_length: int) -> float:
    """Return the FLOPs of forward and backward for one token, averaged over a sequence.

    The backward counts as two forwards. Attention counts the whole square of the sequence, as is usual for MFU, though
    the causal kernel does about half of it; what checkpointing and fused kernels compute again does not count.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
        tokens = torch.zeros(1, context_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(tokens)
    return 3 * counter.get_total_flops() / context_length


def days(tokens: float, flops: float, gpus: int, peak_flops: float, mfu: float) -> float:
    """Return the time in days to train on ``tokens`` tokens of ``flops`` FLOPs each.

    Args:
        tokens: Tokens to train on.
        flops: FLOPs per token, forward and backward.
        gpus: Number of GPUs.
        peak_flops: FLOP/s of one GPU.
        mfu: Model FLOPs utilisation: the share of the peak that training reaches.
    """
    return tokens * flops / (gpus * peak_flops * mfu) / 86_400
