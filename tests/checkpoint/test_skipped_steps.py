"""A run that is cut off between steps that are not finite goes on counting them: it stops where it would have."""

import importlib.util

import pytest
from small_run import Run, Started, assert_equal, finish, replace

pytestmark = [pytest.mark.slow, pytest.mark.serial]
no_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra 'deepspeed'")


@pytest.mark.parametrize(
    ("strategy", "fused"),
    [
        *(("single", False), ("ddp", False), ("fsdp2", False), ("tp", False)),
        *(("single", True), ("fsdp2", True)),
        pytest.param("zero2", False, marks=no_deepspeed),
    ],
)
def test_the_count_of_skipped_steps_survives_a_resume(small_corpus, tmp_path, strategy, fused):
    """Steps 4, 5 and 6 are bad, of which two in a row are allowed; the checkpoint is that of step 5."""
    run = Run(
        small_corpus, str(tmp_path / "run"), strategy, ranks=1 if strategy == "single" else 2, accumulate=1, every=5,
        validate_every=100, poisoned=(2, 4, 5, 6), max_skipped_steps=2, fused=fused,
    )  # fmt: skip
    finish(replace(run, stop_at=5))
    counted = [event["skipped"] for event in run.logs()[0] if event.get("replica") == 0]
    assert counted[:5] == ([0, 0, 1, 1, 2] if fused else [0, 1, 1, 2, 3])
    resumed = Started(run, "auto")
    assert resumed.wait() == [1] * run.ranks
    assert "NonFiniteError: step 5: " in resumed.output()
    assert "3 in a row are more than model.max_skipped_steps, which is 2." in resumed.output()


def test_the_curve_of_skipped_steps_goes_on(small_corpus, tmp_path):
    run = Run(small_corpus, str(tmp_path / "run"), accumulate=1, every=5, validate_every=100, poisoned=(2, 4, 5, 7))
    finish(replace(run, stop_at=5))
    finish(run, "auto")
    cut, resumed = ([event["skipped"] for event in events if "skipped" in event] for events in run.logs())
    assert cut + resumed == [0, 1, 1, 2, 3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("tp", 2)])
def test_a_resume_behind_a_step_left_out_on_the_device_is_exact(small_corpus, tmp_path, strategy, ranks):
    """The first step too, of which AdamW keeps a state that it has not used."""
    run = Run(
        small_corpus, str(tmp_path / "whole"), strategy, ranks, accumulate=1, every=5, validate_every=100,
        poisoned=(1, 5, 6), fused=True,
    )  # fmt: skip
    finish(run)
    cut = replace(run, folder=str(tmp_path / "cut"))
    finish(replace(cut, stop_at=5))
    finish(cut, "auto")
    assert_equal(cut.checkpoints / "step-10", run.checkpoints / "step-10")
