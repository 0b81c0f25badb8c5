"""Whole models of the paper's authors: logits by a plain re-computation from their tensors, in and out again."""

import json

import pytest
import torch
from made_run import OPTIONS, build, make_run, mhf, one_line
from safetensors.torch import load_file, save_file
from test_hf_import import imported
from torch.nn.functional import silu

VOCAB, D_MODEL, LAYERS, HEADS, KV_HEADS = 40, 32, 2, 4, 2
H, D_H, E, D_E = 4, 8, 3, 16
CONFIG = {
    **{"model_type": "their_llama", "vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "rope_theta": 500.0},
    **{"intermediate_size": E * D_E, "hidden_act": "silu", "attention_bias": False, "num_mlp_heads": H},
}


def their_weights(tied: bool = False, num_kuv_heads: int = H, q_norm: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kv = D_MODEL // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": (VOCAB, D_MODEL), "model.norm.weight": (D_MODEL,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, D_MODEL)
    for i in range(LAYERS):
        layer = {
            **dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (D_MODEL,)),
            **dict.fromkeys(("self_attn.q_proj.weight", "self_attn.o_proj.weight"), (D_MODEL, D_MODEL)),
            **dict.fromkeys(("self_attn.k_proj.weight", "self_attn.v_proj.weight"), (kv, D_MODEL)),
            **dict.fromkeys(("mlp.w_self.weight", "mlp.w_self_2.weight"), (D_MODEL, D_MODEL)),
            **dict.fromkeys(("mlp.gate_weight", "mlp.up_weight", "mlp.down_weight"), (E * D_E, num_kuv_heads * D_H)),
            **({"mlp.q_norm.weight": (H, D_H)} if q_norm else {}),
            "mlp.router": (H, D_H, E),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt() * weight


def rotated(x: torch.Tensor) -> torch.Tensor:
    """`[L, d]`, element i turned with element i + d / 2."""
    length, d = x.shape
    angle = torch.arange(length)[:, None] * CONFIG["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
    a, b = x[:, : d // 2], x[:, d // 2 :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def their_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Of one row of tokens, in float64, head by head and sub-network by sub-network."""
    weights = {name: weight.double() for name, weight in weights.items()}
    x = weights["model.embed_tokens.weight"][ids]
    mask = torch.ones(len(ids), len(ids)).tril() == 0
    for i in range(LAYERS):
        w = {name.removeprefix(f"model.layers.{i}."): weight for name, weight in weights.items()}
        y, d = norm(x, w["input_layernorm.weight"]), D_MODEL // HEADS
        q, k, v = (y @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for h in range(HEADS):
            kv = slice(h * KV_HEADS // HEADS * d, (h * KV_HEADS // HEADS + 1) * d)
            scores = rotated(q[:, h * d : (h + 1) * d]) @ rotated(k[:, kv]).T / d**0.5
            heads.append(scores.masked_fill(mask, -torch.inf).softmax(-1) @ v[:, kv])
        x = x + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        q = (y @ w["mlp.w_self.weight"].T).view(len(ids), H, D_H)
        if "mlp.q_norm.weight" in w:
            q = norm(q, w["mlp.q_norm.weight"])
        heads = []
        for h in range(H):
            gate = torch.sigmoid(q[:, h] @ w["mlp.router"][h])
            gate = gate / gate.sum(-1, keepdim=True).clamp_min(1e-20)
            gates, ups, downs = (w[f"mlp.{name}_weight"].view(E * D_E, -1, D_H) for name in ("gate", "up", "down"))
            kuv, s = h * gates.shape[1] // H, 0
            for e in range(E):
                rows = slice(e * D_E, (e + 1) * D_E)
                inner = silu(q[:, h] @ gates[rows, kuv].T) * (q[:, h] @ ups[rows, kuv].T)
                s = s + gate[:, e, None] * (inner @ downs[rows, kuv])
            heads.append(s)
        x = x + torch.cat(heads, -1) @ w["mlp.w_self_2.weight"].T
    x = norm(x, weights["model.norm.weight"])
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def write(folder, weights, shards: int = 1, **changes) -> None:
    folder.mkdir()
    config = {**CONFIG, "tie_word_embeddings": "lm_head.weight" not in weights, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    for i in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({key: weights[key] for key in list(weights)[i::shards]}, folder / name)


@pytest.mark.parametrize(
    ("options", "shards"),
    [({}, 1), ({"tied": True}, 1), ({"num_kuv_heads": 2}, 3), ({"num_kuv_heads": 1, "q_norm": False}, 1)],
)
@torch.no_grad()
def test_logits_are_those_of_their_formulas(options, shards, tmp_path, capsys):
    weights = their_weights(**options)
    write(tmp_path / "theirs", weights, shards)
    out, _ = mhf(capsys, "import", str(tmp_path / "theirs"), str(tmp_path / "out"))
    assert f"read {tmp_path}/theirs as a model of the paper's authors (flash_mhf, 2 layers, d_model 32)" in out
    decoder, ids = imported(tmp_path / "out"), torch.randint(VOCAB, (21,))
    assert decoder.config.ffn.num_subnetworks == E
    expected = their_logits(weights, ids).float()
    assert expected.std() > 0.2
    torch.testing.assert_close(decoder(ids[None])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_run_goes_out_under_their_names_and_comes_back(tied, made_corpus, tmp_path, capsys):
    sizes = {"tie_embeddings": tied, "num_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-5}
    decoder = build(**sizes)
    run = make_run(tmp_path / "run", decoder, made_corpus)
    mhf(capsys, "export", "--to", "authors", str(run), str(tmp_path / "theirs"))
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert ("lm_head.weight" in theirs) != tied
    d_ff = OPTIONS["flash_mhf"]["num_subnetworks"] * OPTIONS["flash_mhf"]["d_e"]
    assert theirs["model.layers.1.mlp.gate_weight"].shape == (d_ff, 32)
    assert theirs["model.layers.0.self_attn.q_proj.weight"].equal(decoder.blocks[0].attention.q_proj.weight)
    mhf(capsys, "import", str(tmp_path / "theirs"), str(tmp_path / "back"))
    back = imported(tmp_path / "back")
    assert all(value.equal(back.state_dict()[name]) for name, value in decoder.state_dict().items())
    ids = torch.arange(30)[None]
    assert back(ids).equal(decoder(ids))
    error = one_line(mhf(capsys, "export", "--to", "authors", str(run), str(tmp_path / "theirs"), code=2))
    assert "exists; move it away" in error


def test_other_layers_do_not_go_out_under_their_names(made_corpus, tmp_path, capsys):
    softmax = build()
    softmax.config.ffn.gate = "softmax"
    for decoder, said in ((build("swiglu"), "has swiglu layers"), (softmax, "has a softmax gate")):
        run = make_run(tmp_path / said, decoder, made_corpus)
        error = one_line(mhf(capsys, "export", "--to", "authors", str(run), str(tmp_path / "theirs"), code=2))
        assert said in error


REFUSED = {
    "no heads": ({"num_attention_heads": None}, lambda w: w, "has no num_attention_heads"),
    "more layers": ({"num_hidden_layers": 3}, lambda w: w, "does not hold the weights"),
    "another width": ({"hidden_size": 64}, lambda w: w, "does not hold the weights"),
    "biases": ({"attention_bias": True}, lambda w: w, "this Llama has attention_bias True"),
    "scaled positions": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, lambda w: w, "rope_type linear"),
    "odd heads": ({"num_attention_heads": "four"}, lambda w: w, "config.json"),
    "no router": ({}, lambda w: {k: v for k, v in w.items() if "router" not in k}, "has no model.layers.0.mlp.router"),
    "a tensor less": ({}, lambda w: {k: v for k, v in w.items() if "1.mlp.w_self.w" not in k}, "blocks.1.ffn.w_in"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_one_line(what, tmp_path, capsys):
    changes, damage, words = REFUSED[what]
    write(tmp_path / "theirs", damage(their_weights()), **changes)
    error = one_line(mhf(capsys, "import", str(tmp_path / "theirs"), str(tmp_path / "out"), code=2))
    assert words in error
    assert "theirs" in error
    assert not (tmp_path / "out").exists()
