"""Every FFN variant in the decoder: shapes, gradients, causality, initial scale, parameter counts, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from mhf_kernels import FlashMHF, flash_mhf, router_weights

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig, InitGainsConfig, count_parameters
from mhf_lightning.model.ffn import FFN_VARIANTS, build_ffn
from mhf_lightning.model.ffn.gated_swiglu import GatedSwiGLU

OPTIONS = {
    "swiglu": {"d_ff": 96},
    "gated_swiglu": {"num_subnetworks": 3, "d_e": 32},
    "mh_ffn": {"num_heads": 2, "d_ff": 96},
    "pkv": {"num_heads": 2, "d_ff": 144},
    "dense_moe": {"num_subnetworks": 3, "d_e": 32},
    "flash_mhf": {"num_heads": 2, "num_subnetworks": 3, "d_e": 32},
}


def tiny(name: str, **changes) -> DecoderConfig:
    config = {"vocab_size": 61, "d_model": 32, "num_layers": 2, "num_attention_heads": 4, **changes}
    return DecoderConfig(ffn=FFNConfig(name=name, **OPTIONS[name]), **config)


def test_every_variant_has_options_here():
    assert set(OPTIONS) == set(FFN_VARIANTS)


@pytest.mark.parametrize("name", FFN_VARIANTS)
def test_loss_reaches_every_parameter_and_matches_the_logits(name):
    torch.manual_seed(0)
    decoder = Decoder(tiny(name))
    tokens = torch.randint(61, (3, 17))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[1, 5:] = -100
    sums = decoder(inputs, labels)
    sums.nll.backward()
    logits = decoder(inputs)
    assert logits.shape == (3, 16, 61)
    torch.testing.assert_close(sums.nll, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    squared = logits.logsumexp(-1).square()[labels != -100].sum()
    torch.testing.assert_close(sums.squared_log_z, squared)
    assert int(sums.num_tokens) == int((labels != -100).sum()) == 37
    for key, parameter in decoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", FFN_VARIANTS)
def test_no_token_sees_the_future(name):
    torch.manual_seed(0)
    decoder = Decoder(tiny(name)).eval()
    tokens = torch.randint(61, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 61
    before, after = decoder(tokens), decoder(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("name", FFN_VARIANTS)
def test_variance_matched_starts_at_the_scale_of_swiglu(name):
    d_model, d_ff = 256, 768
    options = {
        "swiglu": {"d_ff": d_ff},
        "gated_swiglu": {"num_subnetworks": 4, "d_e": 192},
        "mh_ffn": {"num_heads": 4, "d_ff": d_ff},
        "pkv": {"num_heads": 4, "d_ff": d_ff * 3 // 2},
        "dense_moe": {"num_subnetworks": 4, "d_e": 192},
        "flash_mhf": {"num_heads": 4, "num_subnetworks": 4, "d_e": 192},
    }
    x = F.rms_norm(torch.randn(2, 64, d_model, generator=torch.Generator().manual_seed(0)), (d_model,))

    def output_rms(variant: str) -> float:
        torch.manual_seed(1)
        ffn = build_ffn(DecoderConfig(d_model=d_model, ffn=FFNConfig(name=variant, **options[variant])))
        ffn.reset_parameters()
        return ffn(x).square().mean().sqrt().item()

    assert 0.5 < output_rms(name) / output_rms("swiglu") < 1.5


def test_flash_mhf_takes_every_option_from_the_configuration():
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_subnetworks": 2, "d_e": 64, "num_kuv_heads": 2, "query_norm": False}
    gains = InitGainsConfig(v_std=0.5, router_std=0.1)
    ffn = build_ffn(DecoderConfig(d_model=64, ffn=FFNConfig("flash_mhf", skip_linear=True, gains=gains, **options)))
    assert ffn.k.shape == (2, 2, 64, 16)
    assert ffn.w_in is None
    assert ffn.w_out is None
    assert ffn.q_norm is None
    assert ffn.v.std().item() == pytest.approx(0.5, rel=0.05)
    assert ffn.router.std().item() == pytest.approx(0.1, rel=0.2)
    assert ffn.k.std().item() == pytest.approx(0.02 * 2, rel=0.05)


def test_dense_moe_is_flash_mhf_with_one_head():
    torch.manual_seed(0)
    ffn = build_ffn(tiny("dense_moe"))
    ffn.reset_parameters()
    x = torch.randn(2, 5, 32)
    layer = FlashMHF(32, 1, 3, 32)
    state = {"w_in.weight": ffn.w_in.weight, "w_out.weight": ffn.w_out.weight, "router": ffn.router}
    state |= {"q_norm.weight": ffn.q_norm.weight}
    state |= {key: getattr(ffn, key).view(1, 3, 32, 32) for key in "kuv"}
    layer.load_state_dict(state)
    torch.testing.assert_close(ffn(x), layer(x))


def test_mh_ffn_is_the_op_with_one_subnetwork_and_no_gate():
    torch.manual_seed(0)
    ffn = build_ffn(tiny("mh_ffn"))
    ffn.reset_parameters()
    x = torch.randn(2, 5, 32)
    q = ffn.q_norm(ffn.w_in(x).unflatten(-1, (2, 16)))
    o = flash_mhf(q, ffn.k[:, None], ffn.u[:, None], ffn.v[:, None], torch.ones(2, 5, 2, 1))
    torch.testing.assert_close(ffn(x), ffn.w_out(o.flatten(2)))


def test_gated_swiglu_scales_blocks_by_the_gate():
    torch.manual_seed(0)
    ffn = build_ffn(tiny("gated_swiglu"))
    assert isinstance(ffn, GatedSwiGLU)
    ffn.reset_parameters()
    x = torch.randn(2, 5, 32)
    r = router_weights(x[:, :, None], ffn.router)[:, :, 0]
    hidden = F.silu(ffn.gate(x)) * ffn.up(x)
    expected = sum(
        r[..., e : e + 1] * hidden[..., 32 * e : 32 * e + 32] @ ffn.down.weight[:, 32 * e : 32 * e + 32].T
        for e in range(3)
    )
    torch.testing.assert_close(ffn(x), expected)


def test_pkv_is_softmax_attention_over_its_pairs():
    torch.manual_seed(0)
    ffn = build_ffn(tiny("pkv"))
    ffn.reset_parameters()
    x = torch.randn(2, 5, 32)
    q = ffn.q_norm(ffn.w_in(x).unflatten(-1, (2, 16)))
    weights = (torch.einsum("blhd,hnd->blhn", q, ffn.k) / math.sqrt(16)).softmax(-1)
    torch.testing.assert_close(ffn(x), ffn.w_out(torch.einsum("blhn,hnd->blhd", weights, ffn.v).flatten(2)))


def test_tied_heads_share_one_parameter_and_count_once():
    tied, untied = Decoder(tiny("swiglu")), Decoder(tiny("swiglu", tie_embeddings=False))
    assert tied.head.weight is tied.embedding.weight
    assert count_parameters(untied).total - count_parameters(tied).total == 61 * 32
    assert count_parameters(untied).non_embedding == count_parameters(tied).non_embedding


def test_grouped_query_attention_equals_repeated_heads():
    torch.manual_seed(0)
    grouped = Decoder(tiny("swiglu", num_kv_heads=2))
    full = Decoder(tiny("swiglu"))
    state = grouped.state_dict()
    for key in list(state):
        if "k_proj" in key or "v_proj" in key:
            state[key] = state[key].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(state)
    tokens = torch.randint(61, (2, 9))
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_documents_in_one_block_do_not_see_each_other():
    torch.manual_seed(0)
    decoder = Decoder(tiny("flash_mhf")).eval()
    first, second = torch.randint(61, (1, 5)), torch.randint(61, (1, 7))
    together = decoder(
        torch.cat((first, second), 1),
        position_ids=torch.cat((torch.arange(5), torch.arange(7)))[None],
        document_ids=torch.tensor([[0] * 5 + [1] * 7]),
    )
    torch.testing.assert_close(together, torch.cat((decoder(first), decoder(second)), 1))


def test_rotary_scores_depend_on_distance_only():
    from mhf_lightning.model.rope import apply_rotary, rotary_tables

    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        cos, sin = rotary_tables(torch.tensor([[i, j]]), 16, 10_000.0)
        rotated = apply_rotary(torch.cat((q, k), 2), cos, sin)
        return (rotated[0, 0, 0] * rotated[0, 0, 1]).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(3, 1), score(5, 1))


@pytest.mark.parametrize("name", FFN_VARIANTS)
def test_meta_device_counts_like_the_real_model(name):
    with torch.device("meta"):
        meta = Decoder(tiny(name))
    assert all(p.is_meta for p in meta.parameters())
    assert count_parameters(meta) == count_parameters(Decoder(tiny(name)))
    torch.manual_seed(0)
    meta.to_empty(device="cpu").reset_parameters()
    assert meta.head.weight is meta.embedding.weight
    drawn = Decoder(tiny(name))
    torch.manual_seed(0)
    drawn.reset_parameters()
    assert all(value.equal(drawn.state_dict()[key]) for key, value in meta.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 30}, ["d_model is 30", "num_attention_heads is 4"]),
        ({"num_kv_heads": 3}, ["num_kv_heads is 3", "divide"]),
        ({"dropout": 1.0}, ["dropout is 1.0"]),
        ({"num_layers": 0}, ["num_layers is 0"]),
        ({"initialization": "variance-matched"}, ["initialization is 'variance-matched'", "paper, variance_matched"]),
    ],
)
def test_bad_decoder_sizes_are_named(changes, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        tiny("swiglu", **changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        (
            {"name": "flash_mhf", "num_heads": 3, "num_subnetworks": 2, "d_e": 16},
            ["d_model is 32", "ffn.num_heads is 3"],
        ),
        ({"name": "flash_mhf", "num_heads": 2}, ["missing: num_subnetworks, d_e"]),
        ({"name": "swiglu", "d_ff": 64, "num_heads": 2}, ["num_heads given", "'swiglu' takes only d_ff"]),
        ({"name": "swiglu", "d_ff": -1}, ["ffn.d_ff is -1"]),
        ({"name": "swigloo", "d_ff": 64}, ["swigloo", "flash_mhf"]),
        ({"name": "flash_mhf", "num_heads": 4, "num_subnetworks": 2, "d_e": 16, "num_kuv_heads": 3}, ["num_kuv_heads"]),
    ],
)
def test_bad_ffn_options_are_named(ffn, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        Decoder(DecoderConfig(d_model=32, vocab_size=61, num_layers=1, ffn=FFNConfig(**ffn)))
    assert all(word in str(error.value) for word in words)
