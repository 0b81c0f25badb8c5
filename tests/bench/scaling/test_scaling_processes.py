"""Groups of real gloo processes: which run side by side, and what becomes of those that die, hang or fail."""

import signal
from dataclasses import replace

import pytest
import torch
from tiny_cases import run, sizes, write_model

from mhf_lightning.bench.scaling import processes, results
from mhf_lightning.bench.scaling.processes import Outcome

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks would take the GPUs")


def seen(ended: dict[str, Outcome]) -> list[tuple[float, float, set[str]]]:
    """When each case began and ended, and the GPUs that its ranks saw."""
    starts = {name: [events[0] for events in outcome.events] for name, outcome in ended.items()}
    return [
        (
            min(start["time"] for start in starts[name]),
            outcome.ended,
            set(starts[name][0]["devices"].split(",")) if starts[name][0]["devices"] else set(),
        )
        for name, outcome in ended.items()
    ]


def test_cases_share_the_host_but_no_gpu(model, tmp_path):
    """The largest first; two pairs side by side, then single ones; what ran beside is told."""
    ones = [sizes(model).case(f"one{n}", model, "single", 1) for n in range(3)]
    twos = [sizes(model).case(f"two{n}", model, "ddp", 2) for n in range(2)]
    four = sizes(model).case("four", model, "ddp", 4)
    ended = run(tmp_path, *ones, *twos, four, slots="5674")
    assert {outcome.status for outcome in ended.values()} == {"ok"}
    assert ended[four.label].beside == ()
    assert set(ended[twos[0].label].beside) >= {twos[1].label}
    spans = dict(zip(ended, seen(ended), strict=True))
    assert spans[four.label][2] == set("5674")
    assert all(spans[four.label][1] < begun for name, (begun, *_) in spans.items() if name != four.label)
    assert {frozenset(spans[two.label][2]) for two in twos} == {frozenset("56"), frozenset("74")}
    for name, (begun, over, gpus) in spans.items():
        for other, (other_begun, other_over, other_gpus) in spans.items():
            if name != other and begun < other_over and other_begun < over:
                assert not gpus & other_gpus
                assert other in ended[name].beside


def test_where_nothing_is_timed_cases_share_gpus(model, tmp_path):
    """No rank shares with one of its own case, no GPU has more cases than it may, and the emptiest is taken."""
    pairs = [replace(sizes(model).case(f"two{n}", model, "ddp", 2), steps=10) for n in range(3)]
    single = replace(sizes(model).case("one", model, "single", 1), steps=10)
    ended = run(tmp_path, single, *pairs, slots="567", share=2)
    assert {outcome.status for outcome in ended.values()} == {"ok"}
    spans = dict(zip(ended, seen(ended), strict=True))
    assert [spans[pair.label][2] for pair in pairs] == [{"5", "6"}, {"5", "7"}, {"6", "7"}]
    assert len(ended[pairs[0].label].beside) >= 2
    assert spans[single.label][0] > min(spans[pair.label][1] for pair in pairs)


def test_on_a_cpu_one_at_a_time(model, tmp_path):
    one = sizes(model).case("weak", model, "single", 1)
    ended = run(tmp_path, one, replace(one, stage="fixed"))
    assert [outcome.status for outcome in ended.values()] == ["ok", "ok"]
    assert [outcome.beside for outcome in ended.values()] == [(), ()]
    (_, over, gpus), (begun, _, _) = seen(ended)
    assert over < begun
    assert not gpus


@pytest.mark.slow
def test_a_neighbour_that_dies_or_hangs_changes_nothing(model, tmp_path):
    """Beside a rank that kills itself, one without memory and one without end, a case computes what it does alone."""
    good = sizes(model).case("good", model, "ddp", 2)
    alone = run(tmp_path / "alone", good)[good.label]
    huge = replace(good, stage="huge", gpus=1, strategy="single")
    huge = replace(huge, model=write_model(tmp_path / "huge", vocab_size=10**13))
    killed = replace(good, stage="killed", steps=1000, save_at=((3, True),), kill=True)
    endless = replace(good, stage="endless", gpus=1, strategy="single", steps=10**6)
    late = replace(good, stage="late", gpus=1, strategy="single")  # takes a GPU that one of the others had
    ended = run(tmp_path, killed, good, endless, huge, late, slots="012345", timeout=60)
    assert {name.partition(",")[0]: outcome.status for name, outcome in ended.items()} == {
        "good": "ok",
        "late": "ok",
        "huge": "OOM",
        "killed": "failed: rank 1 died (signal 9)",
        "endless": "timeout after 60 s",
    }
    assert {endless.label, killed.label} <= set(ended[good.label].beside)
    assert results.curve(ended[good.label]) == results.curve(alone)


def test_a_case_that_fails_says_how(model, tmp_path):
    one = sizes(model).case("weak", model, "single", 1)
    huge = replace(one, model=write_model(tmp_path / "huge", vocab_size=10**13))
    killed = replace(one, stage="checkpoint", gpus=2, strategy="ddp", steps=1000, save_at=((3, True),), kill=True)
    ended = run(tmp_path, huge, killed)
    assert [outcome.status for outcome in ended.values()] == ["OOM", "failed: rank 1 died (signal 9)"]
    endless = replace(one, steps=10**6)
    (outcome,) = run(tmp_path, endless, timeout=3).values()
    assert outcome.status == "timeout after 3 s"
    row = results.scaling_row(endless, outcome, 1.0, None)
    assert (row["status"], "tokens_per_s" in row) == ("timeout after 3 s", False)


def test_a_rank_that_is_through_is_not_the_one_that_died():
    events = [[{"done": {}}], [{"step": 1}]]
    assert processes._why([0, -signal.SIGSEGV], events) == ("failed: rank 1 died (signal 11)", 1)
