"""Gradient norms by group, the size of updates, bits per byte and the spike alarm, against numbers worked out here."""

import math
import random
import warnings

import pytest
import torch
from timed_run import CONFIG, Timed, train, train_on_ranks

from mhf_lightning.callbacks.model_health import LossSpikes, ModelHealth, group_of, groups, squared_norms
from mhf_lightning.model import Decoder
from mhf_lightning.training.optimizer import OptimizerConfig, build_adamw

GROUPS = ("embedding", "attention", "ffn", "router", "norms")
RUN = {"strategy": "single", "rows": [[4] * 3], "steps": 3, "every": 1}


def test_every_parameter_is_in_one_group():
    decoder = Decoder(CONFIG)
    found = groups(decoder)
    assert set(found) == set(GROUPS)
    assert sum(p.numel() for group in found.values() for p in group) == sum(p.numel() for p in decoder.parameters())
    names = {
        "head.weight": "embedding",
        "blocks.1.attention.q_proj.weight": "attention",
        "blocks.1.attention_norm.weight": "norms",
        "blocks.0.ffn.q_norm.weight": "norms",
        "blocks.0.ffn.router": "router",
        "blocks.0.ffn.k": "ffn",
        "final_norm.weight": "norms",
    }
    assert {name: group_of(name) for name in names} == names


@pytest.mark.parametrize(("sampled", "router_lr_scale"), [(2**18, 1.0), (2**12, 1.0), (2**18, 3.0)])
def test_the_update_is_what_the_optimiser_did(sampled, router_lr_scale, monkeypatch):
    monkeypatch.setattr("mhf_lightning.callbacks.model_health.SAMPLED_WEIGHTS", sampled)
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    optimizer = build_adamw(decoder, OptimizerConfig(lr=0.1, weight_decay=0.5, router_lr_scale=router_lr_scale))
    for _ in range(3):
        before = [p.detach().clone() for p in decoder.parameters()]
        for p in decoder.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    after = list(decoder.parameters())
    update = sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True))
    weight = sum(float(a.double().square().sum()) for a in after)
    found = squared_norms(optimizer, 0.1)
    assert math.sqrt(found[0] / found[1]) == pytest.approx(
        math.sqrt(update / weight), rel=1e-4 if sampled == 2**18 else 0.1
    )
    if sampled == 2**18:  # all elements
        assert found.tolist() == pytest.approx([update, weight], rel=1e-4)


def test_norms_of_groups_are_those_before_clipping(monkeypatch):
    """Against the gradients as they are when the optimiser asks for clipping; the norm is far above grad_clip."""
    seen: list[dict[str, float]] = []

    class Watch(ModelHealth):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found = groups(pl_module.decoder)
            seen.append({n: math.sqrt(sum(float(p.grad.square().sum()) for p in g)) for n, g in found.items()})
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    monkeypatch.setattr("timed_run.callbacks_of", lambda case: [Watch()])
    points = train(RUN)["points"]
    for step in range(3):
        total, logged = math.hypot(*seen[step].values()), points["train/grad_norm"][step]
        assert logged > 1.0  # OptimizerConfig.grad_clip
        for name in GROUPS:
            expected = seen[step][name] / total * logged
            assert points[f"health/grad_norm/{name}"][step] == pytest.approx(expected, rel=1e-5)
    assert 0 < points["health/update_to_weight"][2] < 0.1


@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_that_was_left_out_has_no_norms(on_device, monkeypatch):
    class Poison(ModelHealth):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 1:
                loss.register_hook(lambda grad: grad * float("nan"))
            super().on_before_backward(trainer, pl_module, loss)

    monkeypatch.setattr(Timed, "fused", on_device)
    monkeypatch.setattr("timed_run.callbacks_of", lambda case: [Poison()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        points = train(RUN)["points"]
    assert set(points["health/grad_norm/ffn"]) == {0, 2}
    assert set(points["health/update_to_weight"]) == {0, 2}
    assert set(points["health/loss_spike"]) == {0, 1, 2}


def test_bits_per_byte_are_those_of_each_split(monkeypatch):
    """A token of the training text has four bytes, one of the validation text two (``timed_run.Data``)."""
    monkeypatch.setattr("timed_run.callbacks_of", lambda case: [])
    points = train({**RUN, "validate_every": 3})["points"]
    for split, size in (("train", 4), ("val", 2)):
        bits = points[f"{split}/bits_per_byte"]
        assert set(bits) == set(points[f"{split}/loss"])
        assert 2 in bits
        for step, loss in points[f"{split}/loss"].items():
            assert 2 ** (bits[step] * size) == pytest.approx(math.exp(loss), rel=1e-5)


def losses(n: int, seed: int = 0) -> list[float]:
    """Loss 3 with a standard deviation of 0.1."""
    generator = random.Random(seed)
    return [generator.gauss(3.0, 0.1) for _ in range(n)]


def test_noise_is_no_spike_and_a_spike_is_one():
    spikes = LossSpikes()
    found = [spikes.deviations(loss) for loss in losses(1000)]
    assert found[:50] == [0.0] * 50
    assert max(found) < spikes.THRESHOLD
    assert spikes.mean == pytest.approx(3.0, abs=0.05)
    assert math.sqrt(spikes.variance) == pytest.approx(0.1, rel=0.3)
    expected = (4.5 - spikes.mean) / math.sqrt(spikes.variance)
    assert spikes.deviations(4.5) == pytest.approx(expected)
    assert expected > 10
    assert spikes.mean < 3.1  # it has not moved the average much, so the next is noticed too
    assert spikes.deviations(4.5) > spikes.THRESHOLD


def test_a_constant_loss_has_no_spikes_from_rounding():
    spikes = LossSpikes()
    assert not any(spikes.deviations(2.0) for _ in range(100))
    assert spikes.deviations(2.05) == pytest.approx(5.0)


def test_the_alarm_survives_a_resume():
    """The state of a meter with unread losses, loaded by another, which warns of what the first would have."""
    first, second = ModelHealth(), ModelHealth()
    first._losses = [(i, torch.tensor(loss)) for i, loss in enumerate(losses(60))]
    second.load_state_dict(first.state_dict())
    assert second.spikes.steps == 60
    second._losses = [(60, torch.tensor(9.0))]
    with pytest.warns(RuntimeWarning, match=r"loss spike: 9.0000 at step 60 is .* above the average of 3\.0"):
        second._look_for_spikes()


def test_the_state_is_in_the_checkpoint(tmp_path):
    case = {**RUN, "rows": [[4] * 6], "steps": 6, "every": 4, "folder": str(tmp_path), "save_after": 3}
    whole = train(case)["spikes"]
    resumed = train({**case, "resume": str(tmp_path / "step-3"), "save_after": None})["spikes"]
    assert whole["steps"] == 6
    assert resumed == pytest.approx(whole)


@pytest.mark.parametrize("save_after", [None, 1, 2])
def test_a_save_takes_no_spike_from_the_log(tmp_path, save_after, monkeypatch):
    """Saved between two logging steps, and at one: a point is the highest of its two steps, here the first."""
    monkeypatch.setattr(LossSpikes, "deviations", lambda self, loss: 4.0 - len(seen.append(loss) or seen))
    seen: list[float] = []
    case = {**RUN, "rows": [[4] * 4], "steps": 4, "every": 2, "folder": str(tmp_path), "save_after": save_after}
    assert train(case)["points"]["health/loss_spike"] == {1: 3.0, 3: 1.0}


@pytest.mark.slow
def test_sharded_and_split_models_have_the_same_norms(tmp_path):
    """Also where forwards without a backward come before training (validation) and before the norms (routers)."""
    two = {"rows": [[2] * 3] * 2, "steps": 3, "every": 1}
    looks = {"validate_every": 3, "router": 1}
    cases = {
        "ddp": {**two, "strategy": "ddp"},
        "fsdp2": {**two, **looks, "strategy": "fsdp2"},
        "tp": {**RUN, **looks, "strategy": "tp"},
    }
    results = train_on_ranks(cases, 2, tmp_path)[0]
    assert not [result["error"] for result in results.values() if "error" in result]
    alone = train(RUN)["points"]
    for tag in [f"health/grad_norm/{name}" for name in GROUPS]:
        for step in "012":
            points = {name: result["points"][tag][step] for name, result in results.items()}
            assert points["tp"] == pytest.approx(alone[tag][int(step)], rel=1e-3), tag
            assert points["ddp"] == pytest.approx(points["fsdp2"], rel=1e-3), tag
    ratios = {name: result["points"]["health/update_to_weight"]["2"] for name, result in results.items()}
    assert ratios["fsdp2"] == pytest.approx(ratios["ddp"], rel=1e-3)
    assert ratios["tp"] == pytest.approx(alone["health/update_to_weight"][2], rel=1e-3)
