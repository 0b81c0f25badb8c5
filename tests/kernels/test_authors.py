"""The authors' weights: their formulas, computed anew from their names and shapes, give what our layer gives."""

import pytest
import torch
from mhf_kernels import FlashMHF
from mhf_kernels.authors import from_authors, to_authors
from torch.nn.functional import silu

D_MODEL, H, D_H, E, D_E = 32, 4, 8, 3, 16


def authors_weights(num_kuv_heads: int, q_norm: bool) -> dict[str, torch.Tensor]:
    shapes = {
        "w_self.weight": (D_MODEL, D_MODEL),
        "w_self_2.weight": (D_MODEL, D_MODEL),
        "router": (H, D_H, E),
        **dict.fromkeys(("gate_weight", "up_weight", "down_weight"), (E * D_E, num_kuv_heads * D_H)),
        **({"q_norm.weight": (H, D_H)} if q_norm else {}),
    }
    return {name: torch.randn(shape, dtype=torch.float64) / 4 for name, shape in shapes.items()}


def authors_layer(w: dict[str, torch.Tensor], x: torch.Tensor, num_kuv_heads: int) -> torch.Tensor:
    """Their layer for one row of tokens `[L, d_model]`, head by head and sub-network by sub-network."""
    q = (x @ w["w_self.weight"].T).view(len(x), H, D_H)
    if "q_norm.weight" in w:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["q_norm.weight"]
    heads = []
    for h in range(H):
        gate = torch.sigmoid(q[:, h] @ w["router"][h])
        gate = gate / gate.sum(-1, keepdim=True)
        columns = slice(h * num_kuv_heads // H * D_H, (h * num_kuv_heads // H + 1) * D_H)
        s = torch.zeros_like(q[:, h])
        for e in range(E):
            k, u, v = (
                w[name][e * D_E : (e + 1) * D_E, columns] for name in ("gate_weight", "up_weight", "down_weight")
            )
            s = s + gate[:, e, None] * ((silu(q[:, h] @ k.T) * (q[:, h] @ u.T)) @ v)
        heads.append(s)
    return torch.cat(heads, -1) @ w["w_self_2.weight"].T


@pytest.mark.parametrize("num_kuv_heads", [4, 2, 1])
@pytest.mark.parametrize("q_norm", [True, False])
def test_their_weights_give_their_output(num_kuv_heads, q_norm):
    theirs = authors_weights(num_kuv_heads, q_norm)
    layer = FlashMHF(D_MODEL, H, E, D_E, num_kuv_heads=num_kuv_heads, query_norm=q_norm, dtype=torch.float64)
    layer.load_state_dict(from_authors(theirs))
    x = torch.randn(10, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(layer(x[None])[0], authors_layer(theirs, x, num_kuv_heads), rtol=1e-10, atol=1e-10)


def test_there_and_back_with_prefixes():
    theirs = {f"model.layers.3.mlp.{name}": value for name, value in authors_weights(2, True).items()}
    theirs["model.norm.weight"] = torch.randn(D_MODEL)
    ours = from_authors(theirs)
    assert ours["model.layers.3.mlp.k"].shape == (2, E, D_E, D_H)
    back = to_authors(ours)
    assert back.keys() == theirs.keys()
    assert all(value.equal(theirs[name]) for name, value in back.items())


def test_what_is_no_layer_stays():
    """Attention with names like ours, and the layers of other variants beside a router."""
    state = {"attn.k": torch.randn(4, 4), "attn.w_in.weight": torch.randn(4, 4)}
    state |= {"moe.router": torch.randn(1, 4, 2), "moe.k": torch.randn(8, 4), "moe.w_in.weight": torch.randn(4, 4)}
    assert to_authors(state) == state


def test_what_does_not_fit_is_named():
    theirs = authors_weights(2, True)
    with pytest.raises(ValueError, match="gate_weight has no router beside it"):
        from_authors({"gate_weight": theirs["gate_weight"]})
    with pytest.raises(ValueError, match=r"gate_weight is \[47, 16\]"):
        from_authors({**theirs, "gate_weight": theirs["gate_weight"][:-1]})
