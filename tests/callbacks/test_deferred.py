"""What is deferred is what it would have been at once: nothing is lost, at a save, a validation, or the end."""

import pytest
import timed_run
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.connectors.logger_connector import result
from timed_run import Points, Timed, train
from torch.utils._python_dispatch import TorchDispatchMode

from mhf_lightning.callbacks.deferred import Deferring
from mhf_lightning.callbacks.layout import Layout
from mhf_lightning.callbacks.memory import PeakMemory

RUN = {"strategy": "single", "rows": [[4] * 8], "steps": 4, "every": 2, "router": 2, "accumulate": 2}
WRITERS = {  # one point of each callback
    "throughput/tokens_per_s",
    "memory/peak_gib",
    "health/loss_spike",
    "health/update_to_weight",
    "router/entropy_token/mean",
}


def test_turns():
    done: list[str] = []
    callback = Deferring()
    callback.defer(lambda: callback.defer(lambda: done.append("second of a")) or done.append("a"))
    callback.defer(lambda: done.append("b"))
    callback.on_before_optimizer_step(None, None)
    assert done == ["a", "b"]
    callback.on_before_optimizer_step(None, None)
    assert done == ["a", "b", "second of a"]
    callback.defer(lambda: callback.defer(lambda: done.append("d")) or done.append("c"))
    callback.finish_deferred()
    assert done[3:] == ["c", "d"]
    callback.defer(lambda: done.append("of an interrupted run"))
    callback.setup(None, None, "fit")
    callback.finish_deferred()
    assert len(done) == 5


@pytest.mark.parametrize("kind", [Deferring, PeakMemory, Layout])
def test_a_save_after_an_exception_does_nothing_that_was_left(kind):
    """It might be a collective, of which the rank that failed has another one next."""
    done: list[str] = []
    callback = kind()
    callback.defer(lambda: done.append("of an interrupted run"))
    callback.on_exception(None, None, RuntimeError())
    callback.state_dict()
    assert not done


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"save_after": 2},  # at a logging step, and below between two
        {"save_after": 3, "steps": 5, "rows": [[4] * 10]},
        {"validate_every": 4},
        {"every": 1, "router": 1, "accumulate": 1, "save_after": 3, "validate_every": 2},
    ],
    ids=str,
)
def test_points_and_state_are_those_of_work_done_at_once(case, tmp_path, monkeypatch):
    """All tags, all steps, all values; only the memory of the process differs between two runs."""
    deferred = train({**RUN, **case, "folder": str(tmp_path / "deferred")})
    with monkeypatch.context() as patch:
        patch.setattr(Deferring, "defer", lambda self, work: work())
        at_once = train({**RUN, **case, "folder": str(tmp_path / "at-once")})
    points, expected = deferred["points"], at_once["points"]
    assert set(points) == set(expected)
    assert set(points) >= WRITERS
    for tag in points:
        assert set(points[tag]) == set(expected[tag]), tag
        if not tag.startswith("memory/"):
            assert points[tag] == expected[tag], tag
    for tag in WRITERS - {"throughput/tokens_per_s"}:  # which the first step has none of
        assert set(points[tag]) == set(points["train/loss"]), tag
    assert deferred["totals"] == at_once["totals"]
    assert deferred["spikes"] == at_once["spikes"]


def test_a_resume_from_a_save_at_a_logging_step(tmp_path):
    case = {**RUN, "rows": [[4] * 12], "steps": 6, "folder": str(tmp_path), "save_after": 4}
    whole = train(case)
    resumed = train({**case, "resume": str(tmp_path / "step-4"), "save_after": None})
    assert resumed["spikes"] == pytest.approx(whole["spikes"])
    assert resumed["totals"]["tokens"] == whole["totals"]["tokens"] - 2 * 4 * timed_run.LENGTH  # its first step


class Watch(Callback):
    """Notes what is known when validation begins; may end the run behind a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.known = stop_after, set()

    def on_validation_start(self, trainer, *_):
        if not trainer.sanity_checking and not self.known:  # the first one, with points of one step
            self.known = set(trainer.callback_metrics)
            self.points = set(trainer.loggers[0].points)

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.stop_after:
            raise SystemExit(75)  # as preemption does


@pytest.fixture
def loggers(monkeypatch):
    """Of the runs, also of those that did not end."""
    made: list[Points] = []
    monkeypatch.setattr("timed_run.Points", lambda: made.append(Points()) or made[-1])
    return made


def with_callback(callback, monkeypatch):
    build = timed_run.callbacks_of
    monkeypatch.setattr("timed_run.callbacks_of", lambda case: [*build(case), callback])


def test_points_are_known_when_validation_begins(monkeypatch):
    watch = Watch()
    with_callback(watch, monkeypatch)
    train({**RUN, "validate_every": 4})
    assert watch.known >= WRITERS
    assert watch.points >= WRITERS


@pytest.mark.parametrize("save_after", [2, None])
def test_points_are_written_when_a_save_is_made(save_after, loggers, tmp_path, monkeypatch):
    """The run leaves before another turn; without the save the points are lost, and haunt no later run."""
    with_callback(Watch(stop_after=2), monkeypatch)
    with pytest.raises(SystemExit):
        train({**RUN, "folder": str(tmp_path), "save_after": save_after})
    (logger,) = loggers
    assert WRITERS & set(logger.points) == (WRITERS if save_after else set())
    if save_after:
        assert all(set(logger.points[tag]) == {1} for tag in WRITERS)


def test_no_step_makes_numbers_for_a_progress_bar(monkeypatch, tmp_path):
    """That would be a wait for the device at the end of each."""
    made = []
    monkeypatch.setattr(result, "convert_tensors_to_scalars", made.append)
    train({**RUN, "logdir": str(tmp_path)})
    assert not made


def test_only_steps_that_log_ask_tensors_for_numbers(monkeypatch):
    """Of the module and Lightning, with AdamW as on a GPU; tests/gpu has the callbacks, and the waits themselves."""

    class Asked(TorchDispatchMode, Callback):
        def __init__(self):
            super().__init__()
            self.now, self.steps = 0, []  # what came since the last micro-batch began; the steps in which some came

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.now += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

        def on_train_batch_start(self, trainer, *_):
            self.steps += [trainer.global_step] if self.now else []
            self.now = 0

    asked = Asked()
    monkeypatch.setattr(Timed, "fused", True)
    with_callback(asked, monkeypatch)
    with asked:
        train({**RUN, "rows": [[4] * 20], "steps": 10, "every": 3, "monitored": False})
    assert asked.steps == [0, 3, 6, 9]  # 0: before training
