"""PKV: parametric key-value memory, the FFN as multi-head softmax attention over learned keys and values."""

import math

import torch
import torch.nn.functional as F
from mhf_kernels import HeadRMSNorm
from mhf_kernels.initialization import LINEAR_GAIN
from torch import Tensor, nn

from mhf_lightning.model.config import DecoderConfig


class ParametricKeyValue(nn.Module):
    """Per head, ``softmax(Q K^T / sqrt(d_h)) V`` over ``d_ff`` learned pairs, between W_in and W_out.

    Options: ``num_heads``, ``d_ff`` (pairs per head; 1.5 times a SwiGLU's d_ff for equal parameters), ``query_norm``.
    ``paper`` draws K and V with std 0.02. ``variance_matched`` draws K with std 1, so that the logits have unit
    variance, and V so that the average over ``d_ff`` values has the scale of a SwiGLU layer's output.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        options = config.ffn.take(required=("num_heads", "d_ff"), optional={"query_norm": True})
        self.num_heads, self.d_ff = options["num_heads"], options["d_ff"]
        self.d_model, self.d_h = config.d_model, config.d_model // self.num_heads
        self.initialization = config.initialization
        self.w_in = nn.Linear(config.d_model, config.d_model, bias=False)
        self.q_norm = HeadRMSNorm(self.num_heads, self.d_h, config.norm_eps) if options["query_norm"] else None
        self.k = nn.Parameter(torch.empty(self.num_heads, self.d_ff, self.d_h))
        self.v = nn.Parameter(torch.empty(self.num_heads, self.d_ff, self.d_h))
        self.w_out = nn.Linear(config.d_model, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draw the initial weights as the named initialisation says."""
        nn.init.xavier_uniform_(self.w_in.weight, gain=LINEAR_GAIN)
        nn.init.xavier_uniform_(self.w_out.weight, gain=LINEAR_GAIN)
        k_std = v_std = 0.02
        if self.initialization == "variance_matched":
            k_std = 1.0 if self.q_norm is not None else 1.0 / LINEAR_GAIN
            # With logits of unit variance the squared probabilities sum to e / d_ff.
            v_std = swiglu_output_std(self.d_model, round(self.d_ff / 1.5)) * math.sqrt(self.d_ff / math.e)
        nn.init.normal_(self.k, std=k_std)
        nn.init.normal_(self.v, std=v_std)
        if self.q_norm is not None:
            self.q_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [B, L, d_model]``."""
        q = self.w_in(x).unflatten(-1, (self.num_heads, self.d_h))  # [B, L, H, d_h]
        if self.q_norm is not None:
            q = self.q_norm(q)
        batch, length = x.shape[:2]
        # Every token looks at the same pairs, so the batch folds into the length: [1, H, B * L, d_h].
        queries = q.flatten(0, 1).transpose(0, 1).unsqueeze(0)
        out = F.scaled_dot_product_attention(queries, self.k.unsqueeze(0).to(q.dtype), self.v.unsqueeze(0).to(q.dtype))
        return self.w_out(out.squeeze(0).transpose(0, 1).reshape(batch, length, self.d_model))


def swiglu_output_std(d_model: int, d_ff: int) -> float:
    """Return the output scale of a SwiGLU FFN of std 0.02 on RMS-normalised input.

    Its pre-activations m have variance ``s2 = 0.02^2 d_model``, and for small m ``SiLU(m) = m / 2 + m^2 / 4``, so
    ``E[SiLU(m)^2] = s2 / 4 + 3 s2^2 / 16``.
    """
    s2 = 0.02**2 * d_model
    return math.sqrt(d_ff * (s2 / 4 + 3 * s2**2 / 16) * s2) * 0.02
