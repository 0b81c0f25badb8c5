"""Schedules at known points, decay on matrices only, bad values."""

import math

import pytest
import torch

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig, build_adamw, leave_out_on_device


def test_cosine():
    factor = ScheduleConfig("cosine", warmup_steps=10, final_ratio=0.1).factor(110)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == pytest.approx(1.0)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factor(110) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)


def test_wsd():
    factor = ScheduleConfig("wsd", warmup_steps=4, decay_steps=20, final_ratio=0.0).factor(100)
    assert factor(1) == pytest.approx(0.5)
    assert factor(4) == factor(79) == factor(80) == pytest.approx(1.0)
    assert factor(90) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0.0)


def test_total_steps_can_be_longer_than_the_run():
    assert ScheduleConfig(warmup_steps=0, total_steps=200).factor(100)(100) > 0.4


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="warmup_steps 80"):
        ScheduleConfig("wsd", warmup_steps=80, decay_steps=30).factor(100)
    with pytest.raises(ValueError, match="final_ratio is -3; a learning rate cannot be negative"):
        ScheduleConfig(final_ratio=-3).factor(100)


def test_decay_is_on_matrices_only():
    ffn = FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=16)
    decoder = Decoder(DecoderConfig(vocab_size=50, d_model=32, num_layers=1, num_attention_heads=2, ffn=ffn))
    decayed, rest = build_adamw(decoder, OptimizerConfig(weight_decay=0.3)).param_groups
    names = {id(p): key for key, p in decoder.named_parameters()}
    assert {names[id(p)] for p in rest["params"]} == {
        "blocks.0.attention_norm.weight",
        "blocks.0.ffn_norm.weight",
        "blocks.0.ffn.q_norm.weight",  # two dimensions, but a norm
        "final_norm.weight",
    }
    assert rest["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.3
    assert len(decayed["params"]) + len(rest["params"]) == len(list(decoder.parameters()))
    assert all(isinstance(p, torch.nn.Parameter) for p in decayed["params"])


@pytest.mark.parametrize(
    "changes", [{"lr": 0.0}, {"weight_decay": -0.1}, {"grad_clip": -1.0}, {"router_lr_scale": 0.0}]
)
def test_bad_values_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        OptimizerConfig(**changes)


def test_routers_can_have_a_learning_rate_of_their_own():
    ffn = FFNConfig("flash_mhf", num_heads=2, num_subnetworks=2, d_e=16)
    decoder = Decoder(DecoderConfig(vocab_size=50, d_model=32, num_layers=2, num_attention_heads=2, ffn=ffn))
    optimizer = build_adamw(decoder, OptimizerConfig(lr=1e-3, router_lr_scale=3.0, weight_decay=0.3))
    routers = optimizer.param_groups[2]
    assert [id(p) for p in routers["params"]] == [id(block.ffn.router) for block in decoder.blocks]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-3, 3e-3])
    assert routers["weight_decay"] == 0.3
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in decoder.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert routers["lr"] == pytest.approx(1.5e-3)
    plain = DecoderConfig(
        vocab_size=50, d_model=32, num_layers=1, num_attention_heads=2, ffn=FFNConfig("swiglu", d_ff=48)
    )
    with pytest.raises(ValueError, match="router_lr_scale is for models with routers"):
        build_adamw(Decoder(plain), OptimizerConfig(router_lr_scale=3.0))


def test_the_fused_adamw_leaves_out_the_steps_that_it_is_told_to():
    """Bitwise, with gradients that are not finite: what torch promises for loss scaling only."""

    def train(bad: tuple[int, ...], told: bool) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.ones(5, 3)), torch.nn.Parameter(torch.ones(7))]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3, fused=True)
        for step in range(6):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
                if step in bad:
                    p.grad = p.grad * math.nan if told else None
            assert leave_out_on_device(optimizer, torch.tensor(float(step in bad), dtype=torch.float64))
            optimizer.step()
        return parameters, optimizer

    (ours, told), (theirs, plain) = train((0, 2, 3), True), train((0, 2, 3), False)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert told.state[a]["step"] == 3
        assert all(torch.equal(told.state[a][key], plain.state[b][key]) for key in plain.state[b])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_other_optimisers_are_not_told(kind):
    """They would not look, or refuse."""
    optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert not leave_out_on_device(optimizer, torch.tensor(1.0))
    assert not hasattr(optimizer, "found_inf")
