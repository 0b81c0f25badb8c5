"""The gate's measures against gates made by hand, and the callback on real runs, whole, sharded and split."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from mhf_kernels import flash_mhf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timed_run import CONFIG, train, train_on_ranks

from mhf_lightning.callbacks.router_health import (
    SCALARS,
    GateHealth,
    gate_health,
    heat_map,
    output_norms,
    points,
    sigmoids_and_outputs,
)

H, E, D_E, D_H, T = 2, 4, 8, 4, 8
torch.manual_seed(0)
K, U, V = (torch.randn(H, E, D_E, D_H) for _ in range(3))
LOUD = 40.0  # a sigmoid of it is 1, of its negative 0


def measure(q: torch.Tensor, router: torch.Tensor, *weights: torch.Tensor) -> GateHealth:
    """One layer's gate."""
    return gate_health(*sigmoids_and_outputs(q, router, *weights))


def one_hot(choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and a router by which token t takes sub-network choice[t] alone."""
    q = torch.nn.functional.one_hot(choice, D_H).float()[:, None].expand(-1, H, -1)  # [T, H, d_h]
    router = (2 * torch.eye(D_H, E) - 1) * LOUD
    return q, router.expand(H, -1, -1)


def test_an_equal_gate():
    health = measure(torch.randn(T, H, D_H), torch.zeros(H, D_H, E), K, U, V)
    expected = {"entropy_token": 1, "entropy_mean_gate": 1, "effective_subnetworks": E, "dead_fraction": 0}
    for name, value in {**expected, "sigmoid_sum": E / 2, "saturation": 0}.items():
        assert getattr(health, name).tolist() == pytest.approx([value] * H), name
    assert health.load.flatten().tolist() == pytest.approx([1 / E] * H * E)


def test_every_token_takes_one_and_all_are_taken():
    health = measure(*one_hot(torch.arange(T) % E), K, U, V)
    expected = {"entropy_token": 0, "entropy_mean_gate": 1, "effective_subnetworks": 1, "dead_fraction": 0}
    for name, value in {**expected, "sigmoid_sum": 1, "saturation": 1}.items():
        assert getattr(health, name).tolist() == pytest.approx([value] * H, abs=1e-6), name
    assert health.contribution.flatten().tolist() == pytest.approx([1 / E] * H * E)


def test_all_tokens_take_the_same():
    health = measure(*one_hot(torch.full((T,), 2)), K, U, V)
    expected = {"entropy_token": 0, "entropy_mean_gate": 0, "effective_subnetworks": 1, "dead_fraction": 3 / 4}
    for name, value in expected.items():
        assert getattr(health, name).tolist() == pytest.approx([value] * H, abs=1e-6), name
    assert health.load.round().tolist() == health.contribution.round().tolist() == [[0, 0, 1, 0]] * H


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gate_of_three_quarters_and_a_quarter(autocast):
    """E = 2 with sigmoids 3/4 and 1/4: numbers by hand, which bfloat16 would miss by a few thousandths."""
    router = torch.tensor([[[3.0, 1 / 3], [1.0, 1.0]]]).log()  # [H = 1, d_h = 2, E = 2]; a d_h of 1 is no product
    weights = torch.ones(1, 2, 1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        health = measure(torch.ones(3, 1, 2), router, weights, weights, weights)
    assert health.load.tolist() == [pytest.approx([0.75, 0.25])]
    assert health.effective_subnetworks.item() == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert health.entropy_token.item() == pytest.approx(-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25))
    assert health.sigmoid_sum.item() == pytest.approx(1)
    assert health.contribution.tolist() == [pytest.approx([0.75, 0.25])]  # the sub-networks are the same


@pytest.mark.parametrize("kuv_heads", [1, 2])
def test_contributions_are_those_of_the_op(kuv_heads):
    """The op with all but one gate set to zero is R_e O_e; with one K/U/V head for both heads too."""
    k, u, v = (w[:kuv_heads] for w in (K, U, V))
    q, r = torch.randn(T, H, D_H), torch.rand(T, H, E)
    sizes = r * output_norms(q, k, u, v)
    for e in range(E):
        alone = torch.zeros_like(r)
        alone[..., e] = r[..., e]
        torch.testing.assert_close(sizes[..., e], flash_mhf(q[None], k, u, v, alone[None])[0].norm(dim=-1))


def test_points_are_means_over_heads_and_layers():
    equal = measure(torch.randn(T, H, D_H), torch.zeros(H, D_H, E), K, U, V)
    single = measure(*one_hot(torch.full((T,), 2)), K, U, V)
    values = points({0: equal, 5: single})
    assert values["router/effective_subnetworks/layer_0"] == pytest.approx(E)
    assert values["router/effective_subnetworks/layer_5"] == pytest.approx(1)
    assert values["router/effective_subnetworks/mean"] == pytest.approx((E + 1) / 2)
    assert len(values) == 3 * len(SCALARS)


def test_colours_of_the_heat_map():
    shares = np.array([[0.0, 0.25], [1.0, 0.25], [0.0, 0.25], [0.0, 0.25]])
    image = heat_map(shares)
    cell = 16
    assert image.shape == (4 * cell, 2 * cell + cell // 2 + cell, 3)
    assert image[0, 0].tolist() == [5, 48, 97]  # nothing: the blue end
    assert image[0, cell].tolist() == [255, 255, 255]  # an equal share
    assert image[cell, 0].tolist() == [214, 96, 77]  # four times an equal share: the last colour but one
    assert image[0, -1].tolist() == [103, 0, 31]  # the scale's top is eight times
    assert image[-1, -1].tolist() == [5, 48, 97]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert heat_map(np.full((4, 2), np.nan))[0, 0].tolist() == [255, 255, 255]


RUN = {"strategy": "single", "rows": [[4] * 5], "steps": 5, "every": 2, "router": 4, "dropout": 0.1}


def test_looks_come_when_they_are_due_and_change_nothing(tmp_path):
    looked = train({**RUN, "logdir": str(tmp_path)})
    plain = train({**RUN, "monitored": False})
    assert looked["points"]["train/loss"] == plain["points"]["train/loss"]
    assert looked["weights"] == plain["weights"]
    entropy = looked["points"]["router/entropy_token/layer_1"]
    assert set(entropy) == {1, 3}  # the first logging step, and the fourth step
    assert 0.9 < entropy[3] <= 1
    assert not any(tag.startswith("router/") for tag in plain["points"])
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    tags = {f"router/{name}/layer_{i}" for name in ("load", "contribution") for i in range(CONFIG.num_layers)}
    assert set(events.Tags()["images"]) == tags
    image = events.Images("router/load/layer_0")[1]
    assert (image.step, image.width, image.height) == (3, 4 * 16 + 24, 3 * 16)


def test_a_softmax_gate_is_passed_over(monkeypatch):
    monkeypatch.setattr("timed_run.CONFIG", replace(CONFIG, ffn=replace(CONFIG.ffn, gate="softmax")))
    assert not any(tag.startswith("router/") for tag in train(RUN)["points"])


@pytest.mark.slow
def test_sharded_and_split_models_have_the_same_routers(tmp_path):
    two = {"rows": [[4] * 5] * 2, "steps": 5, "every": 2, "router": 4}
    cases = {
        "ddp": {**two, "strategy": "ddp"},
        "fsdp2": {**two, "strategy": "fsdp2"},
        "tp": {**RUN, "strategy": "tp", "dropout": 0.0},
    }
    results = train_on_ranks(cases, 2, tmp_path)[0]
    assert not [result["error"] for result in results.values() if "error" in result]
    alone = train({**RUN, "dropout": 0.0})["points"]
    routers = [tag for tag in alone if tag.startswith("router/")]
    assert len(routers) == len(SCALARS) * (CONFIG.num_layers + 1)
    for tag in routers:
        for step in "13":
            points = {name: result["points"][tag][step] for name, result in results.items()}
            assert points["tp"] == pytest.approx(alone[tag][int(step)], rel=1e-4), tag
            assert points["ddp"] == pytest.approx(points["fsdp2"], rel=1e-4), tag
