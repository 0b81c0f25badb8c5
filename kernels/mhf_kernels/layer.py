"""The FlashMHF layer as an `nn.Module`: projections, query norm, gate, and the op. May import torch and the op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mhf_kernels.api import flash_mhf
from mhf_kernels.initialization import InitGains, scales

_LEAST_GATE_SUM = 1e-20


class HeadRMSNorm(nn.Module):
    """RMSNorm over the elements of each head, with a weight for each head: `[..., H, d_h]` to the same (step 2)."""

    def __init__(
        self,
        num_heads: int,
        d_h: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads, d_h, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set every weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, q: Tensor) -> Tensor:
        """Normalise with statistics in float32 (or wider); the result has the dtype of `q`."""
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(q.dtype)


def router_weights(q: Tensor, router: Tensor) -> Tensor:
    """Compute the gate `R = sigmoid(P) / sum_e sigmoid(P)` with `P = Q_h W^h` (step 3).

    The product and everything after it is in float32 (float64 for float64 queries), also under autocast.

    Args:
        q: queries, `[B, L, H, d_h]`.
        router: `[H, d_h, E]`.

    Returns:
        `[B, L, H, E]`, float32 (or float64); non-negative, summing to one over E.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        gates = torch.einsum("blhd,hde->blhe", q.to(wide), router.to(wide)).sigmoid()
        return gates / gates.sum(-1, keepdim=True).clamp_min(_LEAST_GATE_SUM)


class FlashMHF(nn.Module):
    """Flash Multi-Head Feed-Forward layer (arXiv 2512.06989): `[B, L, d_model]` to `[B, L, d_model]`.

    Args:
        d_model: width of the model, `H * d_h`.
        num_heads: H.
        num_subnetworks: E, sub-networks of a head; all run for every token.
        d_e: width of a sub-network; `d_ff = E * d_e`.
        num_kuv_heads: heads of K, U, V; fewer than H means that neighbouring query heads share one. Default: H.
        query_norm: RMSNorm of every query head (on in the 370M and 1.3B models).
        skip_linear: leave out W_in and W_out.
        norm_eps: epsilon of the query norm.
        initialization: `paper` or `variance_matched` (see `mhf_kernels.initialization`).
        gains: overrides of single scales.
        device: where to make the parameters; on `meta`, call `to_empty` and `reset_parameters` before use.
        dtype: of the parameters.

    Raises:
        ValueError: a size is not positive, a number of heads does not divide, or the initialisation is unknown.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_subnetworks: int,
        d_e: int,
        *,
        num_kuv_heads: int | None = None,
        query_norm: bool = True,
        skip_linear: bool = False,
        norm_eps: float = 1e-6,
        initialization: str = "variance_matched",
        gains: InitGains | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kuv_heads = num_heads if num_kuv_heads is None else num_kuv_heads
        sizes = {"d_model": d_model, "num_heads": num_heads, "num_subnetworks": num_subnetworks, "d_e": d_e}
        for key, value in {**sizes, "num_kuv_heads": kuv_heads}.items():
            if value <= 0:
                raise ValueError(f"{key} is {value}; it must be a positive integer")
        if d_model % num_heads:
            raise ValueError(f"d_model is {d_model}, num_heads is {num_heads}: d_model must be a multiple of num_heads")
        if num_heads % kuv_heads:
            raise ValueError(f"num_kuv_heads is {kuv_heads}; it must divide num_heads, which is {num_heads}")
        self.num_heads, self.d_h = num_heads, d_model // num_heads
        self.scales = scales(
            initialization,
            d_model=d_model,
            d_h=self.d_h,
            num_subnetworks=num_subnetworks,
            unit_queries=query_norm or skip_linear,
            gains=gains,
        )
        place = {"device": device, "dtype": dtype}
        self.w_in = None if skip_linear else nn.Linear(d_model, d_model, bias=False, **place)
        self.q_norm = HeadRMSNorm(num_heads, self.d_h, norm_eps, **place) if query_norm else None
        self.k = nn.Parameter(torch.empty(kuv_heads, num_subnetworks, d_e, self.d_h, **place))
        self.u = nn.Parameter(torch.empty_like(self.k))
        self.v = nn.Parameter(torch.empty_like(self.k))
        self.router = nn.Parameter(torch.empty(num_heads, self.d_h, num_subnetworks, **place))
        self.w_out = None if skip_linear else nn.Linear(d_model, d_model, bias=False, **place)
        if not self.k.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights at the scales of the named initialisation."""
        for linear in (self.w_in, self.w_out):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight, gain=self.scales.linear_gain)
        if self.q_norm is not None:
            self.q_norm.reset_parameters()
        nn.init.normal_(self.k, std=self.scales.k_std)
        nn.init.normal_(self.u, std=self.scales.u_std)
        nn.init.normal_(self.v, std=self.scales.v_std)
        nn.init.trunc_normal_(self.router, std=self.scales.router_std)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x [B, L, d_model]`."""
        q = (x if self.w_in is None else self.w_in(x)).unflatten(-1, (self.num_heads, self.d_h))  # [B, L, H, d_h]
        if self.q_norm is not None:
            q = self.q_norm(q)
        r = router_weights(q, self.router)  # [B, L, H, E]
        o = flash_mhf(q, self.k, self.u, self.v, r).flatten(2)  # [B, L, d_model]
        return o if self.w_out is None else self.w_out(o)
