"""Which trainings `mhf bench scaling` runs: strategies, GPUs, batches, and what of them is left."""

from dataclasses import replace

import pytest
from tiny_cases import MICRO_BATCH, sizes

from mhf_lightning.bench.scaling import cases


def test_the_cases_of_eight_gpus(model):
    eight = replace(sizes(model, *cases.STRATEGIES, processes=(1, 2, 4, 8)), global_batch=64)
    baselines, weak = cases.weak(eight)
    assert [case.strategy for case in baselines] == ["single"]
    ways = [(case.strategy, case.gpus) for case in weak]
    assert ways == [
        *[("ddp", 2), ("ddp", 4), ("ddp", 8)],
        *[(name, gpus) for name in ("fsdp2", "zero2", "zero3") for gpus in (1, 2, 4, 8)],
        *[("fsdp2_tp", 2), ("fsdp2_tp", 4), ("fsdp2_tp", 8)],
    ]
    assert {case.global_batch / case.gpus for case in weak} == {MICRO_BATCH}
    assert {case.global_batch for group in cases.fixed(eight) for case in group} == {64}
    alone, together, continued = cases.parity(eight)
    assert {case.global_batch for case in alone + together + continued} == {8 * MICRO_BATCH}
    assert {case.strategy for case in alone} == {"single"}
    assert {(case.strategy, case.gpus) for case in together} == {
        *((name, 8) for name in cases.STRATEGIES),
        ("fsdp2", 4),
    }
    labels = [case.label for group in (baselines, weak, alone, together, continued) for case in group]
    assert len(set(labels)) == len(labels)
    assert {case.resume for case in continued} == {case.label for case in alone + together if case.save_at}
    assert {(case.gpus, case.continues) for case in continued if case.strategy == "fsdp2"} == {
        (8, "single on 1"),
        (4, "fsdp2 on 8"),
        (8, "fsdp2 on 4"),
    }
    with pytest.raises(ValueError, match="change it or --micro_batch"):
        cases.fixed(replace(eight, global_batch=12))


def test_parity_on_one_gpu_is_that_of_the_strategies(model):
    one = sizes(model, *cases.STRATEGIES, processes=(1,))
    alone, together, continued = cases.parity(one)
    assert [(case.strategy, case.gpus) for case in alone] == [("single", 1)]
    assert [(case.strategy, case.gpus) for case in together] == [("fsdp2", 1), ("zero2", 1), ("zero3", 1)]
    assert [(case.strategy, case.continues) for case in continued] == [
        ("fsdp2", "single on 1"),
        ("single", "fsdp2 on 1"),
    ]


def test_what_is_left(model):
    """A case that is continued is run again, unless all that continue it are done."""
    four = sizes(model, *cases.STRATEGIES, processes=(2, 4))
    alone, together, continued = cases.parity(four)
    done = {case.label for case in [*alone, *together, *continued[1:]]}
    assert cases.left([alone, together, continued], done) == [alone, [], continued[:1]]
    assert cases.left([alone, together, continued], done | {continued[0].label}) == [[], [], []]
    checkpoint = cases.checkpoint(four)
    (killed,), (resumed,) = checkpoint
    assert cases.left(checkpoint, set()) == checkpoint
    assert cases.left(checkpoint, {resumed.label}) == [[], []]
    assert resumed.label == cases.label("checkpoint", "small/tiny", "fsdp2", 4, "fsdp2 on 4")
    assert killed.save_at
