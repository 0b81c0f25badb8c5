"""Throughput of real runs against a fake clock: accumulation, validation, checkpoints, resume, ranks, FLOPs, MFU."""

import pytest
import torch
from mhf_kernels import flash_mhf
from timed_run import CHECKPOINT, COMPILE, CONFIG, LENGTH, SECONDS, VALIDATION, train, train_on_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhf_lightning.callbacks import MonitorConfig
from mhf_lightning.callbacks.throughput import DEVICES, PHASES
from mhf_lightning.model import Decoder
from mhf_lightning.plan.flops import flops_per_token
from mhf_lightning.plan.gpus import GPUS

STEP = sum(SECONDS.values())  # of one micro-batch that is a step
TOKENS = 4 * LENGTH
FLOPS = flops_per_token(CONFIG, LENGTH)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


def test_rates_shares_and_flops_of_one_process():
    result = train({"strategy": "single", "rows": [[4] * 6], "steps": 6, "every": 2, "peak_tflops": 1e-6})
    points = result["points"]
    rate = points["throughput/tokens_per_s"]
    assert set(rate) == {1, 3, 5}
    # The first step does not count; its window holds one step, without the callbacks behind the meter.
    assert rate[1] == close(TOKENS / STEP)
    assert rate[3] == close(TOKENS / STEP)
    assert points["throughput/samples_per_s"][3] == close(4 / STEP)
    assert points["throughput/tokens_per_s_per_gpu"][3] == rate[3]
    assert points["throughput/tokens_per_s_average"][5] == close(TOKENS / STEP)
    assert points["throughput/tflops_per_s"][3] == close(rate[3] * FLOPS / 1e12)
    assert points["throughput/mfu"][3] == close(rate[3] * FLOPS / 1e6)
    assert [points["throughput/flops"][step] for step in (1, 3, 5)] == [close(n * TOKENS * FLOPS) for n in (2, 4, 6)]
    first = COMPILE + SECONDS["data"] + SECONDS["backward"] + SECONDS["optimizer"]
    assert points["time/compile"][1] == close(first / (first + STEP))
    for step in (1, 3, 5):
        assert sum(points[f"time/{phase}"][step] for phase in PHASES) == close(1)
    for phase, seconds in SECONDS.items():
        assert points[f"time/{phase}"][3] == close(seconds / STEP)
    assert points["time/compile"][3] == 0
    assert result["totals"] == {"tokens": 5 * TOKENS, "samples": 20, "seconds": close(5 * STEP)}


def test_accumulation_and_an_uneven_last_batch():
    case = {"strategy": "single", "rows": [[4] * 7 + [1]], "steps": 4, "accumulate": 2, "every": 4}
    result = train(case)
    # The first step, two micro-batches, does not count; of the last batch only its one row does.
    seconds = 6 * STEP - 3 * SECONDS["optimizer"]
    assert result["points"]["throughput/tokens_per_s"][3] == close((5 * 4 + 1) * LENGTH / seconds)
    assert result["totals"]["tokens"] == 21 * LENGTH


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_lightnings_profilers_work_beside_the_meter(profiler, monkeypatch, tmp_path):
    """They are told of the same fetches, in pairs, and what is measured stays the same."""
    case = {"strategy": "single", "rows": [[4] * 6], "steps": 6, "every": 2}
    monkeypatch.chdir(tmp_path)
    profiled = train({**case, "profiler": profiler})
    assert profiled["points"]["throughput/tokens_per_s"] == train(case)["points"]["throughput/tokens_per_s"]


def test_validation_counts_neither_as_time_nor_as_tokens():
    result = train({"strategy": "single", "rows": [[4] * 6], "steps": 6, "every": 3, "validate_every": 3})
    points = result["points"]
    assert points["throughput/tokens_per_s"][5] == close(TOKENS / STEP)
    assert points["time/validation"][5] == close(2 * VALIDATION / (3 * STEP + 2 * VALIDATION))
    assert points["time/validation"][2] == 0


def test_checkpoints_do_not_count_and_totals_go_on_after_a_resume(tmp_path):
    case = {"strategy": "single", "rows": [[4] * 6], "steps": 6, "every": 4, "folder": str(tmp_path), "save_after": 3}
    whole = train(case)
    points = whole["points"]
    assert points["throughput/tokens_per_s"][3] == close(3 * TOKENS / (3 * STEP))
    first = COMPILE + SECONDS["data"] + SECONDS["backward"] + SECONDS["optimizer"]
    assert points["time/checkpoint"][3] == close(CHECKPOINT / (first + 3 * STEP + CHECKPOINT))
    assert whole["totals"] == {"tokens": 5 * TOKENS, "samples": 20, "seconds": close(5 * STEP)}
    resumed = train({**case, "resume": str(tmp_path / "step-3"), "save_after": None})
    # Steps 2 and 3 before the checkpoint; 5 and 6 after it, for the first of the new start does not count.
    assert resumed["totals"] == {"tokens": 4 * TOKENS, "samples": 16, "seconds": close(4 * STEP + SECONDS["logging"])}
    assert resumed["points"]["throughput/flops"][3] == close(4 * TOKENS * FLOPS)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """Rank 1 is slower, has a smaller last batch and other targets; split replicas count once."""
    uneven = {"rows": [[4, 4, 4, 3], [4, 4, 4, 1]], "steps": 4, "every": 4, "speeds": {"1": 3.0}}
    cases = {
        "ddp": {"strategy": "ddp", **uneven, "validate_every": 2},
        "fsdp2": {"strategy": "fsdp2", "rows": [[4] * 4] * 2, "steps": 4, "every": 4},
        "tp": {"strategy": "tp", "rows": [[4] * 4], "steps": 4, "every": 4},
    }
    ranks = train_on_ranks(cases, 2, tmp_path)
    for results in ranks:
        for name, result in results.items():
            assert "error" not in result, (name, result["error"])
    ddp, fsdp2, tp = (ranks[0][name] for name in cases)

    seconds = (1 + 3) / 2 * 3 * STEP  # the mean over ranks
    assert ddp["points"]["throughput/tokens_per_s"]["3"] == close((4 + 4 + 3 + 4 + 4 + 1) * LENGTH / seconds)
    assert ddp["points"]["throughput/samples_per_s"]["3"] == close(20 / seconds)
    assert ranks[0]["ddp"]["totals"] == ranks[1]["ddp"]["totals"]
    for result in ranks[0]["ddp"], ranks[1]["ddp"]:
        assert result["val"]["perplexity"] == pytest.approx(result["val"]["direct"], rel=1e-9)

    rate = fsdp2["points"]["throughput/tokens_per_s"]["3"]
    assert rate == close(2 * TOKENS / STEP)
    assert fsdp2["points"]["throughput/tokens_per_s_per_gpu"]["3"] == close(rate / 2)
    assert fsdp2["points"]["throughput/tflops_per_s"]["3"] == close(rate / 2 * FLOPS / 1e12)
    # Both ranks of a split replica read the same tokens.
    rate = tp["points"]["throughput/tokens_per_s"]["3"]
    assert rate == close(TOKENS / STEP)
    assert tp["points"]["throughput/tokens_per_s_per_gpu"]["3"] == close(rate / 2)
    for result in (ddp, fsdp2, tp):
        memory = {key: value["3"] for key, value in result["points"].items() if key.startswith("memory/")}
        assert memory["memory/peak_min_gib"] <= memory["memory/peak_mean_gib"] <= memory["memory/peak_max_gib"]
        assert memory["memory/peak_rank"] in (0, 1)


def test_flops_are_those_of_a_real_step_and_of_the_op():
    """Forward and backward of the real decoder, and the op's share: nine products of d_ff, three of the router."""
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    # CPU attention has no formula of its own; made of products, it is counted as the whole square of the sequence.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Decoder(CONFIG)(tokens).sum().backward()
    assert counter.get_total_flops() == 2 * LENGTH * FLOPS
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    ffn = CONFIG.ffn
    d_h = CONFIG.d_model // ffn.num_heads
    q = torch.randn(2, LENGTH, ffn.num_heads, d_h)
    k = torch.randn(ffn.num_heads, ffn.num_subnetworks, ffn.d_e, d_h)
    router = torch.randn(ffn.num_heads, d_h, ffn.num_subnetworks)
    with FlopCounterMode(display=False) as op:
        flash_mhf(q, k, k, k, router=router)
    by_hand = 2 * LENGTH * 2 * ffn.num_heads * ffn.num_subnetworks * d_h * (3 * ffn.d_e + 1)
    assert op.get_total_flops() == by_hand
    assert counts["mhf.flash_mhf_routed"] == CONFIG.num_layers * by_hand
    assert counts["mhf.flash_mhf_routed_backward"] == CONFIG.num_layers * 2 * by_hand


def test_every_known_device_has_a_peak_and_its_neighbours_have_none():
    assert set(DEVICES.values()) <= set(GPUS)
    assert "NVIDIA A10G" not in DEVICES
    assert "NVIDIA H20" not in DEVICES


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"monitor.peak_tflops is 0; it must be positive"):
        MonitorConfig(peak_tflops=0)
    with pytest.raises(ValueError, match=r"monitor.router_every_n_steps is -1; it must be 0 or more"):
        MonitorConfig(router_every_n_steps=-1)
