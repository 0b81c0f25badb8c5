"""FlashMHF's gate for layers with a single head, shared by ``gated_swiglu`` and ``dense_moe``."""

from mhf_kernels import router_weights
from torch import Tensor


def gate_hidden(hidden: Tensor, x: Tensor, router: Tensor) -> Tensor:
    """Scale each block of a hidden layer by its sub-network's gate R (the paper's equation for R, with H = 1).

    Args:
        hidden: ``[B, L, E * d_e]``.
        x: ``[B, L, d_model]``, what the router reads.
        router: ``[1, d_model, E]``.
    """
    r = router_weights(x.unsqueeze(2), router).squeeze(2)  # [B, L, E], float32
    blocks = hidden.unflatten(-1, (r.shape[-1], -1))  # [B, L, E, d_e]
    return (blocks * r.unsqueeze(-1).to(hidden.dtype)).flatten(2)
