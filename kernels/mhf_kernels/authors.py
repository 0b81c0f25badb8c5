"""The authors' state-dict names and shapes, to ours and back. Works on dictionaries of tensors; imports torch only.

Theirs, per layer: `w_self.weight`, `w_self_2.weight` `[d_model, d_model]`; `gate_weight`, `up_weight`, `down_weight`
`[d_ff, H_kuv * d_h]`, sub-network e being the rows `e d_e ... (e + 1) d_e`; `router` `[H, d_h, E]`; `q_norm.weight`
`[H, d_h]`. `router` and `q_norm.weight` are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

LINEAR = {"w_self.weight": "w_in.weight", "w_self_2.weight": "w_out.weight"}
STACKED = {"gate_weight": "k", "up_weight": "u", "down_weight": "v"}


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with FlashMHF layers as `FlashMHF` names and shapes them; other keys stay.

    Args:
        state: of one layer, or of a model with any prefixes.

    Raises:
        ValueError: a layer has no router, which tells E and d_h, or its shapes do not fit together.
    """
    converted = {}
    for key, value in state.items():
        prefix, name = _split(key)
        if name in STACKED:
            router = state.get(f"{prefix}router")
            if router is None:
                raise ValueError(f"{key} has no {prefix}router beside it: this is no layer of the authors' FlashMHF")
            _, d_h, num_subnetworks = router.shape
            d_ff, width = value.shape
            if d_ff % num_subnetworks or width % d_h:
                raise ValueError(
                    f"{key} is {list(value.shape)}; with the router's {num_subnetworks} sub-networks and d_h {d_h} it "
                    "must be [multiple of the one, multiple of the other]"
                )
            rows = value.reshape(num_subnetworks, d_ff // num_subnetworks, width // d_h, d_h)  # [E, d_e, H_kuv, d_h]
            converted[prefix + STACKED[name]] = rows.permute(2, 0, 1, 3).contiguous()
        else:
            converted[prefix + LINEAR.get(name, name)] = value
    return converted


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with FlashMHF layers as the authors' module names and shapes them; other keys stay.

    A layer is what has a `router`, and a `k` of four dimensions.
    """
    linear = {ours: theirs for theirs, ours in LINEAR.items()}
    stacked = {ours: theirs for theirs, ours in STACKED.items()}
    converted = {}
    for key, value in state.items():
        prefix, name = _split(key)
        if f"{prefix}router" not in state or f"{prefix}k" not in state or state[f"{prefix}k"].dim() != 4:
            converted[key] = value
        elif name in stacked:
            num_kuv_heads, num_subnetworks, d_e, d_h = value.shape
            rows = value.permute(1, 2, 0, 3).reshape(num_subnetworks * d_e, num_kuv_heads * d_h)
            converted[prefix + stacked[name]] = rows.contiguous()
        else:
            converted[prefix + linear.get(name, name)] = value
    return converted


def _split(key: str) -> tuple[str, str]:
    """Split a key into the layer's prefix and the name within the layer."""
    parts = key.split(".")
    length = 2 if parts[-1] == "weight" else 1
    cut = max(0, len(parts) - length)
    prefix = ".".join(parts[:cut])
    return f"{prefix}." if prefix else "", ".".join(parts[cut:])
