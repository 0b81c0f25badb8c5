"""Dense-MoE: FlashMHF with one head, written as three plain matrix products."""

import torch
import torch.nn.functional as F
from mhf_kernels import HeadRMSNorm
from mhf_kernels.initialization import LINEAR_GAIN
from torch import Tensor, nn

from mhf_lightning.model.config import DecoderConfig
from mhf_lightning.model.ffn.gate import gate_hidden


class DenseMoE(nn.Module):
    """A dense mixture of E sub-networks over the whole width (the paper's ablation H = 1, so d_h = d_model).

    A head as wide as the model has nothing to fuse, so the layer runs on ordinary matrix products and keeps its
    ``d_ff``-wide intermediates. Options: ``num_subnetworks``, ``d_e``, ``query_norm``. Initialised as FlashMHF.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        options = config.ffn.take(required=("num_subnetworks", "d_e"), optional={"query_norm": True})
        self.num_subnetworks = options["num_subnetworks"]
        self.initialization = config.initialization
        d_ff = self.num_subnetworks * options["d_e"]
        self.w_in = nn.Linear(config.d_model, config.d_model, bias=False)
        self.q_norm = HeadRMSNorm(1, config.d_model, config.norm_eps) if options["query_norm"] else None
        self.k = nn.Parameter(torch.empty(d_ff, config.d_model))
        self.u = nn.Parameter(torch.empty(d_ff, config.d_model))
        self.v = nn.Parameter(torch.empty(d_ff, config.d_model))
        self.router = nn.Parameter(torch.empty(1, config.d_model, self.num_subnetworks))
        self.w_out = nn.Linear(config.d_model, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draw the initial weights as the named initialisation says."""
        nn.init.xavier_uniform_(self.w_in.weight, gain=LINEAR_GAIN)
        nn.init.xavier_uniform_(self.w_out.weight, gain=LINEAR_GAIN)
        ku_std = v_std = 0.02
        if self.initialization == "variance_matched":
            ku_std /= 1.0 if self.q_norm is not None else LINEAR_GAIN
            v_std *= self.num_subnetworks
        nn.init.normal_(self.k, std=ku_std)
        nn.init.normal_(self.u, std=ku_std)
        nn.init.normal_(self.v, std=v_std)
        nn.init.trunc_normal_(self.router, std=0.02)
        if self.q_norm is not None:
            self.q_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [B, L, d_model]``."""
        q = self.w_in(x)
        if self.q_norm is not None:
            q = self.q_norm(q.unsqueeze(2)).squeeze(2)
        hidden = F.silu(F.linear(q, self.k)) * F.linear(q, self.u)  # [B, L, E * d_e]
        return self.w_out(F.linear(gate_hidden(hidden, q, self.router), self.v.T))
