"""SIGKILL of a random rank at a random moment: what is resumed cannot be told from what was never interrupted.

`make test` tries a few; `make test-faults` (MHF_FAULTS=full) as many as the tables in this file say.
"""

import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open
from small_run import Run, Started, assert_equal, expected_history, finish, history, losses, replace, validations

from mhf_lightning.checkpoint.folder import checkpoints, find_newest_valid, verify

pytestmark = pytest.mark.serial
FULL = os.environ.get("MHF_FAULTS") == "full"
KILLS = 20 if FULL else 3
KILLS_IN_A_SAVE = 50 if FULL else 5
GLOBAL_BATCH = 16


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def uninterrupted(request, small_corpus, tmp_path_factory) -> Run:
    """A run of 20 steps on two ranks with dropout, accumulation 4 and four validations, left alone."""
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    run = Run(small_corpus, str(folder), strategy=request.param, ranks=2, max_steps=20, every=3)
    finish(run)
    assert history(run) == expected_history(run, GLOBAL_BATCH, 20)
    assert sorted(validations(run.logs())) == [5, 10, 15, 20]
    return run


def test_killed_runs_end_as_if_never_killed(uninterrupted, tmp_path):
    """Kills alternate between loader workers 0 and 2, and between training and validation."""
    seed = int(os.environ.get("MHF_FAULTS_SEED", random.randrange(10**6)))
    print(f"MHF_FAULTS_SEED={seed}")
    dice = random.Random(seed)
    run = replace(uninterrupted, folder=str(tmp_path / "killed"))
    kills = landed_in_validation = 0
    generation = 0
    while kills < KILLS:
        started = Started(replace(run, workers=2 * (kills % 2)), "auto")
        at = dice.randrange(1, 4 * (run.max_steps - 2))  # micro-batches after the start of this attempt
        in_validation = kills % 3 == 2

        def reached(started=started, at=at, in_validation=in_validation) -> bool:
            events = started.events()
            if in_validation:
                return any(event["event"] == "validation" for event in events)
            return sum(event["event"] == "micro-batch" for event in events) >= at

        started.wait_until(reached)
        time.sleep(dice.uniform(0, 0.02))
        alive = all(process.is_alive() for process in started.processes)
        started.kill(dice.randrange(2))
        kills += alive
        landed_in_validation += alive and started.events()[-1]["event"] == "validation"
        if not alive:  # it had ended: compare, then start over
            assert [process.exitcode for process in started.processes] == [0, 0], started.output()
            compare(run, uninterrupted)
            generation += 1
            run = replace(run, folder=str(tmp_path / f"killed-{generation}"))
    finish(run, ckpt_path="auto")
    compare(run, uninterrupted)
    assert landed_in_validation >= max(1, KILLS // 6)


def compare(run: Run, whole: Run) -> None:
    assert history(run) == history(whole)
    assert losses(run.logs()) == losses(whole.logs())
    assert validations(run.logs()) == validations(whole.logs())
    assert_equal(run.checkpoints / "step-20", whole.checkpoints / "step-20")


def test_a_kill_during_a_save_leaves_a_whole_checkpoint(small_corpus, tmp_path):
    """Saves after every step, of a model large enough that most of the time is spent in them."""
    shared_memory = Path("/dev/shm")
    assert shared_memory.stat().st_dev != tmp_path.stat().st_dev
    run = Run(
        small_corpus, str(tmp_path / "run"), strategy="ddp", ranks=2, max_steps=10_000, every=1, accumulate=1,
        weights=512, validate_every=1000, environment={"TMPDIR": str(shared_memory)},
    )  # fmt: skip
    during_a_save, durations = 0, []
    newest = 0
    for _ in range(KILLS_IN_A_SAVE):
        started = Started(run, "auto")
        before = newest
        started.wait_until(lambda before=before: max(checkpoints(run.checkpoints), default=0) > before)
        saving = partial(has_unfinished, run.checkpoints)
        started.wait_until(saving)
        begun = time.monotonic()
        started.wait_until(lambda saving=saving: not saving())
        seconds = time.monotonic() - begun
        started.wait_until(saving)
        time.sleep(random.uniform(0, 1.1 * seconds))
        durations.append(seconds)
        assert all(process.is_alive() for process in started.processes), started.output()
        started.kill(random.randrange(2))
        during_a_save += saving()
        path, skipped = find_newest_valid(run.checkpoints)
        assert skipped == []
        newest = verify(path).step
        assert newest > before
        for step, committed in checkpoints(run.checkpoints).items():
            assert verify(committed).step == step
            assert steps_in(committed) == {step}
        assert (run.checkpoints / (run.checkpoints / "latest").read_text().strip()).is_dir()
    assert during_a_save >= KILLS_IN_A_SAVE // 5
    median = 1000 * sorted(durations)[len(durations) // 2]
    print(f"{during_a_save} of {KILLS_IN_A_SAVE} kills left an unfinished folder; a save takes {median:.0f} ms")


def has_unfinished(folder: Path) -> bool:
    return any(not (path / "manifest.json").exists() for path in folder.glob("step-*"))


def steps_in(path: Path) -> set[float]:
    """Every optimiser step counter in all shards."""
    steps = set()
    for shard in path.glob("shard-*.safetensors"):
        with safe_open(str(shard), framework="pt") as file:
            steps |= {file.get_tensor(name).item() for name in file.keys() if name.endswith("/step")}  # noqa: SIM118
    return steps
