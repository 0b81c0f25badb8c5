"""SwiGLU, the baseline: ``(SiLU(X W_gate) * (X W_up)) W_down``."""

import torch.nn.functional as F
from torch import Tensor, nn

from mhf_lightning.model.config import DecoderConfig


class SwiGLU(nn.Module):
    """The Llama feed-forward layer. Options: ``d_ff``. Both initialisations draw every matrix with std 0.02."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d_ff = config.ffn.take(required=("d_ff",))["d_ff"]
        self.gate = nn.Linear(config.d_model, d_ff, bias=False)
        self.up = nn.Linear(config.d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draw every matrix from a normal distribution of standard deviation 0.02."""
        for projection in (self.gate, self.up, self.down):
            nn.init.normal_(projection.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [B, L, d_model]``."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
