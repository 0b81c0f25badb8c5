"""Host time inside our callbacks, measured. ``python tests/callbacks/test_overhead.py`` prints it.

The bounds are generous: this machine may be busy. The share of a step on a GPU is measured in tests/gpu.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import timed_run
from lightning.pytorch import Callback

STEPS, EVERY = 120, 10
HOOKS = [name for name in dir(Callback) if name.startswith("on_") and name != "on_exception"]


class HookTimer:
    """Adds up the time in the hooks of callbacks, by callback and optimiser step."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))

    def watch(self, callback: Callback) -> Callback:
        """Time all hooks of a callback."""
        for name in HOOKS:
            setattr(callback, name, self._timed(type(callback).__name__, getattr(callback, name)))
        return callback

    def _timed(self, who: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            step, begun = trainer.global_step, time.perf_counter()
            result = hook(trainer, *args, **kwargs)
            self.seconds[who][step] += time.perf_counter() - begun
            return result

        return timed


def measure() -> dict[str, tuple[float, float]]:
    """Return, by callback, the median milliseconds of a step that logs nothing, and of one that logs with the next.

    A step's time is what comes while it is the last one that was made, also in the turn before the next is. In the next
    comes what was deferred twice.
    """
    timer, build = HookTimer(), timed_run.callbacks_of
    timed_run.callbacks_of = lambda case: [timer.watch(callback) for callback in build(case)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            case = {"strategy": "single", "rows": [[4] * STEPS], "steps": STEPS, "every": EVERY}
            timed_run.train({**case, "router": 200, "logdir": folder, "progress": "lines"})
    finally:
        timed_run.callbacks_of = build
    found = {}
    for who, by_step in timer.seconds.items():
        ordinary = [1e3 * s for step, s in by_step.items() if EVERY < step < STEPS and step % EVERY > 1]
        logging = [1e3 * (by_step[step] + by_step[step + 1]) for step in range(2 * EVERY, STEPS, EVERY)]
        found[who] = statistics.median(ordinary), statistics.median(logging)
    return found


@pytest.mark.slow
@pytest.mark.serial
def test_the_callbacks_cost_little_on_the_host():
    found = measure()
    assert 0 < sum(ordinary for ordinary, _ in found.values()) < 2
    assert 0 < sum(logging for _, logging in found.values()) < 100


if __name__ == "__main__":
    print("milliseconds of the host, medians: a step that logs nothing, one that logs with the next")
    for who, (ordinary, logging) in measure().items():
        print(f"{who:15} {ordinary:8.3f} {logging:8.3f}")
