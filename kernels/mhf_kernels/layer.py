"""FlashMHF, the feed-forward layer of the paper, as a plain `nn.Module`. May import torch and its siblings."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mhf_kernels.functional import flash_mhf
from mhf_kernels.initialization import InitGains, LayerSizes, initial_scales
from mhf_kernels.reference import softmax_weights

GATES = ("sigmoid", "softmax")


class HeadRMSNorm(nn.Module):
    """RMSNorm over the last dimension of `[..., H, d_h]`, with a weight of its own for each head.

    Computed in float32 (float64 for float64 inputs), returned in the dtype of the input.
    """

    def __init__(
        self,
        num_heads: int,
        d_h: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_heads, d_h, device=device, dtype=dtype))  # [H, d_h]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., H, d_h]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), x.shape[-1:], eps=self.eps)
        return (normed * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        """Show sizes in `repr`."""
        num_heads, d_h = self.weight.shape
        return f"num_heads={num_heads}, d_h={d_h}, eps={self.eps}"


class FlashMHF(nn.Module):
    """Flash multi-head feed-forward layer: `[B, L, d_model] -> [B, L, d_model]` (arXiv 2512.06989).

    `Q = split_H(X W_in)`; `R` as in `router_weights`; `S` as in `flash_mhf`; `O = concat_H(S) W_out`. No biases. Keeps
    `O(B L d_model)` for the backward, whatever d_ff = num_subnetworks * d_e.

    Args:
        d_model: width of the input and the output.
        num_heads: H; d_h = d_model / num_heads.
        num_subnetworks: E, the sub-networks of a head; every token runs through all of them.
        d_e: width of one sub-network; the paper takes 8/3 d_h, rounded up to a multiple of 64.
        num_kuv_heads: H_kuv, K/U/V heads; several query heads share one where it is smaller. None: num_heads.
        query_norm: RMSNorm each head of Q.
        skip_linear: leave out W_in and W_out.
        gate: `sigmoid`, the paper's R, or `softmax` over the sub-networks, an ablation, which PyTorch computes.
        recompute_queries: keep X and S for the backward, and compute Q from X again: half of the memory of a compiled
            layer, for one more product with W_in. One backward only: `retain_graph` is of no use.
        norm_eps: epsilon of the query norm.
        initialization: `variance_matched` (the layer starts at the scale of a SwiGLU FFN) or `paper`.
        gains: overrides of single values of the initialisation.
        device: device of the parameters; on `meta`, follow with `to_empty` and `reset_parameters`.
        dtype: dtype of the parameters.

    Raises:
        ValueError: sizes that do not fit together, or an unknown gate or initialisation.
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
        gate: str = "sigmoid",
        recompute_queries: bool = False,
        norm_eps: float = 1e-6,
        initialization: str = "variance_matched",
        gains: InitGains | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_kuv_heads is None:
            num_kuv_heads = num_heads
        _check_sizes(
            d_model=d_model,
            num_heads=num_heads,
            num_subnetworks=num_subnetworks,
            d_e=d_e,
            num_kuv_heads=num_kuv_heads,
        )
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}; it must be one of {', '.join(GATES)}")
        self.d_model, self.num_heads, self.d_h = d_model, num_heads, d_model // num_heads
        self.num_subnetworks, self.d_e, self.num_kuv_heads = num_subnetworks, d_e, num_kuv_heads
        self.initialization, self.gate, self.recompute_queries = initialization, gate, recompute_queries
        sizes = LayerSizes(d_model, self.d_h, num_subnetworks, query_norm=query_norm, has_linear=not skip_linear)
        self.scales = initial_scales(initialization, sizes, gains)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        def linear() -> nn.Linear | None:
            return None if skip_linear else nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)

        self.w_in = linear()
        self.q_norm = HeadRMSNorm(num_heads, self.d_h, norm_eps, device, dtype) if query_norm else None
        self.router = empty(num_heads, self.d_h, num_subnetworks)
        self.k = empty(num_kuv_heads, num_subnetworks, d_e, self.d_h)
        self.u = empty(num_kuv_heads, num_subnetworks, d_e, self.d_h)
        self.v = empty(num_kuv_heads, num_subnetworks, d_e, self.d_h)
        self.w_out = linear()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as `initialization` and `gains` say.

        Truncation is at +-2, the default of `trunc_normal_`: at the paper's std of 0.02 it cuts nothing off.
        """
        for w in (self.w_in, self.w_out):
            if w is not None:
                nn.init.xavier_uniform_(w.weight, gain=self.scales.linear_gain)
        if self.q_norm is not None:
            self.q_norm.reset_parameters()
        if self.scales.truncate_router and self.scales.router_std > 0:  # trunc_normal_ divides by std
            nn.init.trunc_normal_(self.router, std=self.scales.router_std)
        else:
            nn.init.normal_(self.router, std=self.scales.router_std)
        nn.init.normal_(self.k, std=self.scales.k_std)
        nn.init.normal_(self.u, std=self.scales.u_std)
        nn.init.normal_(self.v, std=self.scales.v_std)

    def queries(self, x: Tensor) -> Tensor:
        """Return Q `[B, L, H, d_h]` of `x [B, L, d_model]`, normalised where the layer does so.

        With `router_weights(layer.queries(x), layer.router)` one can look at the gate.
        """
        q = x if self.w_in is None else self.w_in(x)
        q = q.unflatten(-1, (self.num_heads, self.d_h))
        return q if self.q_norm is None else self.q_norm(q)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, d_model]` to `[B, L, d_model]`."""
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"the input must be [B, L, d_model = {self.d_model}]; got {list(x.shape)}")
        if self.recompute_queries and torch.is_grad_enabled():
            s = checkpoint(
                self._subnetworks, x, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_the_ops_output
            )
        else:
            s = self._subnetworks(x)
        o = s.flatten(-2)  # [B, L, d_model]
        return o if self.w_out is None else self.w_out(o)

    def _subnetworks(self, x: Tensor) -> Tensor:
        """Map `[B, L, d_model]` to S `[B, L, H, d_h]`: steps 1 to 4."""
        q = self.queries(x)  # [B, L, H, d_h]
        if self.gate == "softmax":
            return flash_mhf(q, self.k, self.u, self.v, softmax_weights(q, self.router))
        return flash_mhf(q, self.k, self.u, self.v, router=self.router)

    def extra_repr(self) -> str:
        """Show sizes in `repr`."""
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, num_subnetworks={self.num_subnetworks}, "
            f"d_e={self.d_e}, num_kuv_heads={self.num_kuv_heads}, gate={self.gate}, "
            f"initialization={self.initialization}"
        )


# S is kept in any case, as the input of W_out; so the op itself is never run again.
_OPS = [torch.ops.mhf.flash_mhf_routed.default, torch.ops.mhf.flash_mhf.default]
_keep_the_ops_output = partial(create_selective_checkpoint_contexts, _OPS)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    d_model, num_heads, num_kuv_heads = sizes["d_model"], sizes["num_heads"], sizes["num_kuv_heads"]
    if d_model % num_heads != 0:
        raise ValueError(f"d_model must be a multiple of num_heads; got d_model {d_model} and num_heads {num_heads}")
    if num_heads % num_kuv_heads != 0:
        raise ValueError(
            f"num_heads must be a multiple of num_kuv_heads; got num_heads {num_heads}, num_kuv_heads {num_kuv_heads}"
        )
