"""Gated SwiGLU: SwiGLU whose ``d_ff`` is cut into E blocks, each scaled by FlashMHF's gate. A control for the gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhf_lightning.model.config import DecoderConfig
from mhf_lightning.model.ffn.gate import gate_hidden


class GatedSwiGLU(nn.Module):
    """SwiGLU with a sigmoid-normalised gate over blocks of d_ff: the gain of the gate without the heads.

    Options: ``num_subnetworks`` (E) and ``d_e``. Since the gates average 1 / E, ``variance_matched`` draws ``down``
    E times larger, so that the layer starts at the scale of plain SwiGLU; ``paper`` draws every matrix with std 0.02.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        options = config.ffn.take(required=("num_subnetworks", "d_e"))
        self.num_subnetworks = options["num_subnetworks"]
        self.initialization = config.initialization
        d_ff = self.num_subnetworks * options["d_e"]
        self.gate = nn.Linear(config.d_model, d_ff, bias=False)
        self.up = nn.Linear(config.d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, config.d_model, bias=False)
        self.router = nn.Parameter(torch.empty(1, config.d_model, self.num_subnetworks))

    def reset_parameters(self) -> None:
        """Draw gate, up and router with std 0.02, and down with std 0.02 or, variance-matched, 0.02 E."""
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.normal_(self.up.weight, std=0.02)
        matched = self.initialization == "variance_matched"
        nn.init.normal_(self.down.weight, std=0.02 * (self.num_subnetworks if matched else 1))
        nn.init.trunc_normal_(self.router, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [B, L, d_model]``."""
        hidden = F.silu(self.gate(x)) * self.up(x)  # [B, L, E * d_e]
        return self.down(gate_hidden(hidden, x, self.router))
