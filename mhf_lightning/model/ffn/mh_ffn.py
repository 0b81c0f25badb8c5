"""MH-FFN: the naive multi-head FFN, one ``d_ff``-wide SwiGLU per head, intermediates in memory."""

import math

import torch
import torch.nn.functional as F
from mhf_kernels import HeadRMSNorm
from mhf_kernels.initialization import LINEAR_GAIN
from torch import Tensor, nn

from mhf_lightning.model.config import DecoderConfig


class MultiHeadFFN(nn.Module):
    """FlashMHF without sub-networks, gate and fused kernel: its activations take ``H * d_ff`` numbers a token.

    Options: ``num_heads``, ``d_ff``, ``query_norm``. ``paper`` draws K, U, V with std 0.02; ``variance_matched``
    draws K and U with std ``0.02 sqrt(d_model / d_h)``, which gives pre-activations the scale of SwiGLU's, and V with
    std 0.02, since no gate makes the sum smaller.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        options = config.ffn.take(required=("num_heads", "d_ff"), optional={"query_norm": True})
        self.num_heads, d_ff = options["num_heads"], options["d_ff"]
        self.d_h = config.d_model // self.num_heads
        self.initialization = config.initialization
        self.w_in = nn.Linear(config.d_model, config.d_model, bias=False)
        self.q_norm = HeadRMSNorm(self.num_heads, self.d_h, config.norm_eps) if options["query_norm"] else None
        self.k = nn.Parameter(torch.empty(self.num_heads, d_ff, self.d_h))
        self.u = nn.Parameter(torch.empty(self.num_heads, d_ff, self.d_h))
        self.v = nn.Parameter(torch.empty(self.num_heads, d_ff, self.d_h))
        self.w_out = nn.Linear(config.d_model, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draw the initial weights as the named initialisation says."""
        nn.init.xavier_uniform_(self.w_in.weight, gain=LINEAR_GAIN)
        nn.init.xavier_uniform_(self.w_out.weight, gain=LINEAR_GAIN)
        ku_std = 0.02
        if self.initialization == "variance_matched":
            query_std = 1.0 if self.q_norm is not None else LINEAR_GAIN
            ku_std *= math.sqrt(self.num_heads) / query_std
        nn.init.normal_(self.k, std=ku_std)
        nn.init.normal_(self.u, std=ku_std)
        nn.init.normal_(self.v, std=0.02)
        if self.q_norm is not None:
            self.q_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [B, L, d_model]``."""
        q = self.w_in(x).unflatten(-1, (self.num_heads, self.d_h))  # [B, L, H, d_h]
        if self.q_norm is not None:
            q = self.q_norm(q)
        gate = torch.einsum("blhd,hfd->blhf", q, self.k)
        up = torch.einsum("blhd,hfd->blhf", q, self.u)
        out = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.v)
        return self.w_out(out.flatten(2))
