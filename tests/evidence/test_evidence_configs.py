"""The configurations that are compared: equal in parameters, in recipe and in what is held fixed."""

from pathlib import Path

import pytest
import torch
import yaml

from mhf_lightning.bench.model import read_model
from mhf_lightning.evidence.queue import read_queue
from mhf_lightning.model import Decoder, DecoderConfig, count_parameters

EVIDENCE = Path(__file__).parents[2] / "configs/evidence"
SIZES = {"30m": 30e6, "125m": 125e6}
LONGER = {"30m_long": "30m"}  # two of its models, over more tokens
VARIANTS = {"swiglu", "gated_swiglu", "mh_ffn", "pkv", "dense_moe"} | {f"flash_mhf_dh{d_h}" for d_h in (64, 128, 256)}
TOKENS_PER_STEP = 65_536


def models(size: str) -> dict[str, DecoderConfig]:
    files = sorted((EVIDENCE / size).glob("*.yaml"))
    return {path.stem: read_model(path) for path in files if path.stem != "recipe"}


@pytest.mark.parametrize("size", SIZES)
def test_all_models_of_a_size_match_within_one_percent(size):
    counts = {}
    for name, config in models(size).items():
        with torch.device("meta"):
            counts[name] = count_parameters(Decoder(config)).non_embedding
    assert counts.keys() >= VARIANTS
    assert counts["swiglu"] == pytest.approx(SIZES[size], rel=0.06)
    for name, count in counts.items():
        assert count == pytest.approx(counts["swiglu"], rel=0.01), name


@pytest.mark.parametrize("size", SIZES)
def test_all_that_differs_is_the_feed_forward_layer_and_the_depth(size):
    for name, config in models(size).items():
        shape = (config.vocab_size, config.d_model, config.d_model // config.num_attention_heads, config.tie_embeddings)
        assert shape == (16384, {"30m": 512, "125m": 1024}[size], 64, True)
        assert config.num_layers == (10 if name in ("swiglu", "gated_swiglu", "flash_mhf_dh128_deep") else 8)
        assert config.initialization == ("paper" if name.endswith("init_paper") else "variance_matched")
        if name.startswith("flash_mhf_dh"):
            d_h = int(name.removeprefix("flash_mhf_dh").split("_")[0])
            assert config.d_model // config.ffn.num_heads == d_h


@pytest.mark.parametrize("size", [*SIZES, *LONGER])
def test_a_step_has_the_same_tokens_and_a_tenth_of_them_warm_up(size):
    recipe = yaml.safe_load((EVIDENCE / size / "recipe.yaml").read_text())
    trainer, data, schedule = recipe["trainer"], recipe["data"], recipe["model"]["schedule"]
    assert data["micro_batch_size"] * trainer["accumulate_grad_batches"] * 1024 == TOKENS_PER_STEP
    assert schedule["warmup_steps"] * 10 == trainer["max_steps"]
    assert trainer["max_steps"] * trainer["accumulate_grad_batches"] % trainer["val_check_interval"] == 0


def test_the_list_names_configurations_and_sweeps_every_variant():
    rows = read_queue(EVIDENCE / "queue.csv")
    for row in rows:
        assert (EVIDENCE / row.size / f"{row.variant}.yaml").exists(), row.name
    for variant in (*VARIANTS, "flash_mhf_dh128_init_paper"):
        rates = {float(row.lr) for row in rows if (row.size, row.variant) == ("30m", variant)}
        assert len(rates) >= 3, variant
    for variant in ("swiglu", "flash_mhf_dh128"):
        seeds = [row.seed for row in rows if (row.size, row.variant) == ("30m", variant)]
        assert len(set(seeds)) >= 3, variant
    listed = {(row.size, row.variant) for row in rows}
    assert listed == {(size, name) for size in (*SIZES, *LONGER) for name in models(size)}


@pytest.mark.parametrize(("size", "same"), LONGER.items())
def test_a_longer_run_is_of_the_same_models(size, same):
    assert models(size).keys() == {"swiglu", "flash_mhf_dh128"}
    for name, config in models(size).items():
        assert config == models(same)[name]
    recipe, longer = (yaml.safe_load((EVIDENCE / of / "recipe.yaml").read_text()) for of in (same, size))
    assert longer["trainer"]["max_steps"] == 2 * recipe["trainer"]["max_steps"]
    assert longer["model"]["optimizer"] == recipe["model"]["optimizer"]
