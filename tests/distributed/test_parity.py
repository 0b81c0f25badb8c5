"""Every strategy gives the loss and the gradient norm of a single process, step by step, and the same decisions.

Ranks hold very unequal numbers of targets, three micro-batches make a step, and every step is clipped (``worker.py``).
"""

import importlib.util
import math

import pytest
from training_processes import Results, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.serial]
STEPS = 20
SHORT = 3

deepspeed_missing = importlib.util.find_spec("deepspeed") is None
needs_deepspeed = pytest.mark.skipif(deepspeed_missing, reason="needs the extra 'deepspeed'")

# name: number of processes, and the case for worker.py. Each group of processes runs all cases of its size.
LONG = {
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "tp": (2, {"strategy": "tp"}),
    "zero2": (2, {"strategy": "zero2"}),
    "zero3": (2, {"strategy": "zero3"}),
    "fsdp2_tp": (4, {"strategy": "fsdp2_tp"}),
    **{f"{strategy} on 4": (4, {"strategy": strategy}) for strategy in ("ddp", "fsdp2", "tp", "zero2", "zero3")},
    "compiled ddp": (2, {"strategy": "ddp", "module": {"compile_blocks": True}}),
    "compiled fsdp2": (2, {"strategy": "fsdp2", "module": {"compile_blocks": True}}),
    "compiled tp": (
        2,
        {"strategy": "tp", "module": {"compile_blocks": True, "activation_checkpointing": "selective"}},
    ),
}
# A few steps each, against a single process with the same model.
VARIANTS = {
    **{
        f"{strategy} {ffn}": {"strategy": strategy, "ffn": ffn}
        for strategy in ("ddp", "fsdp2", "tp", "zero2", "zero3")
        for ffn in ("swiglu", "mh_ffn", "pkv", "gated_swiglu", "dense_moe")
    },
    "tp flash_mhf_grouped": {"strategy": "tp", "ffn": "flash_mhf_grouped"},
    "tp flash_mhf_softmax": {"strategy": "tp", "ffn": "flash_mhf_softmax"},
    "tp grouped queries": {"strategy": "tp", "num_kv_heads": 2},
    "tp untied": {"strategy": "tp", "tie_embeddings": False},
    "zero3 untied": {"strategy": "zero3", "tie_embeddings": False},
    "fsdp2 full checkpointing": {"strategy": "fsdp2", "module": {"activation_checkpointing": "full"}},
    "zero3 selective checkpointing": {"strategy": "zero3", "module": {"activation_checkpointing": "selective"}},
    "ddp ffn checkpointing": {
        "strategy": "ddp",
        "module": {"activation_checkpointing": "ffn", "fully_checkpointed_blocks": 1},
    },
    "fsdp2, seeds differ": {"strategy": "fsdp2", "seed_differs": True},
    "tp, seeds differ": {"strategy": "tp", "seed_differs": True},
}
# Reductions of another order and, in bfloat16, of other roundings: looser.
BF16 = {
    f"{strategy} {precision}": {"strategy": strategy, "precision": precision}
    for strategy, precision in (
        ("fsdp2", "bf16-mixed"),
        ("fsdp2", "bf16-true"),
        ("tp", "bf16-mixed"),
        ("zero2", "bf16-mixed"),
        ("zero3", "bf16-mixed"),
    )
}
BF16["zero3 seeds differ"] = {"strategy": "zero3", "precision": "bf16-mixed", "seed_differs": True}
REFUSED = {
    "tp over one K/V head": ({"strategy": "tp", "num_kv_heads": 1}, "it must divide num_kv_heads 1"),
    "compiled zero3": ({"strategy": "zero3", "module": {"compile_blocks": True}}, "turn it off"),
    "compiled tp full": (
        {"strategy": "tp", "module": {"compile_blocks": True, "activation_checkpointing": "full"}},
        "to selective or none",
    ),
    "compiled tp ffn": (
        {"strategy": "tp", "module": {"compile_blocks": True, "activation_checkpointing": "ffn"}},
        "to selective or none",
    ),
    "compiled tp, some full": (
        {"strategy": "tp", "module": {"compile_blocks": True, "fully_checkpointed_blocks": 1}},
        "fully_checkpointed_blocks to 0",
    ),
    "more blocks than there are": ({"strategy": "ddp", "module": {"fully_checkpointed_blocks": 99}}, "from 0 to"),
    "sizes": ({"strategy": "wrong_sizes"}, "must be the number of processes, which is 2"),
}
# Which steps are poisoned on the last rank only, with what, and how many skipped steps are allowed in a row.
POISON = {"steps": [0, 2, 3], "rank": 1}
POISONED = {
    f"{strategy} {what}": {"strategy": strategy, "steps": 6, "poison": {**POISON, "what": what}}
    for strategy in ("ddp", "fsdp2", "tp", "zero2", "zero3")
    for what in ("loss", "gradient")
}
POISONED["zero2 bf16-mixed gradient"] = {**POISONED["zero2 gradient"], "precision": "bf16-mixed"}
STOPPED = {
    f"{strategy} stops": {
        "strategy": strategy,
        "steps": 6,
        "poison": {**POISON, "what": "loss"},
        "module": {"max_skipped_steps": 1},
    }
    for strategy in ("ddp", "fsdp2", "zero2", "zero3")
}
ABORTED = {
    "ddp aborts": {
        "strategy": "ddp",
        "steps": 3,
        "poison": {**POISON, "what": "gradient"},
        "module": {"max_skipped_steps": 0},
    }
}
# Ranks of one split replica reduce neither loss nor gradients between them: only the explicit agreement helps.
ONE_SIDED = {"tp reported loss": {"strategy": "tp", "steps": 6, "poison": {**POISON, "what": "reported loss"}}}


def and_fused(cases: dict) -> dict:
    """Add the cases in which the optimiser, as on a GPU, leaves steps out by itself, and the host hears of it later."""
    fused = {
        f"{name}, fused": {**case, "poison": {**case["poison"], "fused": True}}
        for name, case in cases.items()
        if not case["strategy"].startswith("zero")  # DeepSpeed's optimisers take no fused one's place
    }
    return {**cases, **fused}


POISONED, STOPPED, ABORTED, ONE_SIDED = map(and_fused, (POISONED, STOPPED, ABORTED, ONE_SIDED))
# Meshes of two dimensions, which the fused optimiser takes one at a time.
ON_FOUR = {
    f"fsdp2_tp {what}, fused": {
        "strategy": "fsdp2_tp",
        "steps": 6,
        "poison": {**POISON, "rank": 3, "what": what, "fused": True},
    }
    for what in ("gradient", "reported loss")
}


def marks(name: str) -> list:
    return [needs_deepspeed] if "zero" in name else []


def parameters(cases) -> list:
    return [pytest.param(name, marks=marks(name)) for name in cases]


def available(cases: dict) -> dict:
    return {name: case for name, case in cases.items() if not (deepspeed_missing and "zero" in name)}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    """What one process computes, by the name of the case."""
    short = {**VARIANTS, **BF16}
    cases = {name: {**case, "strategy": "single", "steps": SHORT} for name, case in short.items()}
    for case in cases.values():
        case.pop("module", None)
        case.pop("precision", None)
    cases["long"] = {"strategy": "single", "steps": STEPS}
    return run_cases(cases, 1, tmp_path_factory.mktemp("single"))[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Results:
    cases = {name: {**case, "steps": STEPS} for name, (world, case) in LONG.items() if world == 2}
    cases |= {name: {**case, "steps": SHORT} for name, case in {**VARIANTS, **BF16}.items()}
    cases |= {name: {**case, "steps": SHORT} for name, (case, _) in REFUSED.items()}
    cases |= {**POISONED, **ONE_SIDED, **STOPPED, **ABORTED}
    cases |= {f"{name} dropout": {"strategy": name, "steps": SHORT, "dropout": 0.2} for name in ("tp", "fsdp2")}
    return run_cases(available(cases), 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Results:
    cases = {name: {**case, "steps": STEPS} for name, (world, case) in LONG.items() if world == 4}
    cases |= ON_FOUR
    return run_cases(available(cases), 4, tmp_path_factory.mktemp("four"))


def check(ranks: Results, name: str, expected: dict, tolerance: float) -> None:
    assert "error" not in expected, expected["traceback"]
    for rank in ranks:
        result = rank[name]
        assert "error" not in result, result["traceback"]
        assert result["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
        assert result["tokens_seen"] == expected["tokens_seen"]
        # Weights that tensor parallelism does not split must stay the same on every rank, bit for bit.
        assert result["whole_weights"] == ranks[0][name]["whole_weights"]


@pytest.mark.parametrize("name", parameters(LONG))
def test_twenty_steps_are_those_of_one_process(name, single, two, four):
    world = LONG[name][0]
    assert len(single["long"]["loss"]) == STEPS
    assert min(single["long"]["grad_norm"]) > 0.5  # each step is clipped
    check({2: two, 4: four}[world], name, single["long"], 1e-5)


@pytest.mark.parametrize("name", parameters(VARIANTS))
def test_variants_agree(name, single, two):
    check(two, name, single[name], 1e-5)


@pytest.mark.parametrize("name", parameters(BF16))
def test_bfloat16_is_close_to_float32(name, single, two):
    check(two, name, single[name], 5e-3)


@pytest.mark.parametrize("name", parameters(("zero2 bf16-mixed", "zero3 bf16-mixed", "zero3 seeds differ")))
def test_zero_begins_with_the_weights_in_float32(name, single, two):
    """With weights rounded to bfloat16 no step of a warm-up is seen that is smaller than the rounding."""
    for rank in two:
        assert rank[name]["exact_weights"] == single[name]["exact_weights"]


@pytest.mark.parametrize("name", ["fsdp2 bf16-mixed", "fsdp2 bf16-true"])
def test_gradients_are_reduced_in_float32(name, two):
    for rank in two:
        assert rank[name]["reduced_types"] == ["torch.float32"]


@pytest.mark.parametrize("name", parameters(REFUSED))
def test_what_does_not_work_is_refused_at_the_start(name, two):
    for rank in two:
        assert rank[name]["error"].startswith("ValueError")
        assert REFUSED[name][1] in rank[name]["error"]


def test_a_split_replica_drops_the_same_elements(two):
    """Lightning seeds anew under these strategies, so that a single process draws other numbers."""
    for key in ("loss", "grad_norm", "whole_weights"):
        assert two[0]["tp dropout"][key] == two[1]["tp dropout"][key]
    assert two[0]["tp dropout"]["loss"] != pytest.approx(two[0]["fsdp2 dropout"]["loss"], rel=1e-5)


def test_gradients_are_reduced_once_a_step(two):
    """FSDP2 reduce-scatters each of its three groups in the third micro-batch only; DDP's ranks differ until then."""
    for rank in two:
        assert rank["fsdp2"]["reduce_scatters"] == [0, 0, 3] * STEPS
    differ = [a != b for a, b in zip(two[0]["ddp"]["gradients"], two[1]["ddp"]["gradients"], strict=True)]
    assert differ == [True, True, False] * STEPS


@pytest.mark.parametrize("name", ["compiled ddp", "compiled fsdp2"])
def test_a_block_is_one_graph(name, two):
    """Dynamo's optimiser for DDP would cut it in two, which Dynamo counts as one and AOTAutograd as two."""
    for rank in two:
        assert rank[name]["compiled_graphs"] == [1, 1]


@pytest.mark.parametrize("name", parameters(POISONED))
def test_a_step_that_is_not_finite_on_one_rank_leaves_no_trace_on_any(name, two):
    for rank in two:
        result = rank[name]
        assert "error" not in result, result["traceback"]
        assert result["skipped_steps"] == 3
        # Weights and optimiser before each step against those before the next: bitwise the same where it was left out.
        assert result["changed"] == [False, True, False, False, True]
        assert [not math.isfinite(x) for x in result["grad_norm"]] == [True, False, True, True, False, False]
        healthy, rel = two[0]["ddp loss"]["grad_norm"], 5e-2 if "bf16" in name else 1e-5
        assert [result["grad_norm"][i] for i in (1, 4, 5)] == pytest.approx([healthy[i] for i in (1, 4, 5)], rel=rel)


@pytest.mark.parametrize("name", ONE_SIDED)
def test_ranks_of_a_split_replica_agree(name, two):
    for rank in two:
        assert rank[name]["skipped_steps"] == 3
        assert rank[name]["changed"] == [False, True, False, False, True]


@pytest.mark.parametrize("name", ON_FOUR)
def test_ranks_of_split_and_sharded_replicas_agree(name, four):
    for rank in four:
        assert rank[name]["skipped_steps"] == 3
        assert rank[name]["changed"] == [False, True, False, False, True]


@pytest.mark.parametrize("name", parameters(("ddp", "fsdp2", "tp", "zero2", "zero3")))
def test_no_step_has_a_barrier(name, two):
    """Hosts would wait for their GPUs in it."""
    for rank in two:
        assert len(set(rank[name]["barriers"])) == 1


@pytest.mark.parametrize("name", parameters(STOPPED))
def test_too_many_in_a_row_stop_every_rank_with_the_samples(name, two):
    for rank in two:
        assert rank[name]["error"].startswith("NonFiniteError: step 3: ")
        # Rank 1 reads the last two of every four samples; step 3 is micro-batches 9, 10 and 11.
        assert "not finite: 38, 39, 42, 43, 46, 47." in rank[name]["error"]


@pytest.mark.parametrize("name", ABORTED)
def test_zero_aborts_at_once(name, two):
    for rank in two:
        assert rank[name]["error"].startswith("NonFiniteError: step 0: ")
        assert "of the step: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11." in rank[name]["error"]
