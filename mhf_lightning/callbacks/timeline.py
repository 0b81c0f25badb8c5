"""Where the time goes: marks along the device's queue, or along the clock where there is none. Imports torch only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in time that may still lie ahead."""

    def synchronize(self) -> None:
        """Wait until it has passed."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds to a later mark; both have passed."""


class ClockMark:
    """A point in time of the host."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.time = self.clock()

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end_event: ClockMark) -> float:
        """Return the milliseconds to a later mark."""
        return 1e3 * (end_event.time - self.time)


def cuda_mark() -> Mark:
    """Return a mark at the end of what is queued on the current CUDA stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(eq=False)
class Border:
    """Where one phase ends and the next begins."""

    mark: Mark
    begins: str
    done: tuple[int, int]  # (tokens, samples) completed in the phase that ends here


class Timeline:
    """Cuts the time into phases without waiting: a phase lasts from its mark to the next one.

    Marks on a CUDA stream measure the device, so a phase of the host that the device does not wait for takes no time.
    What marks enclose is read later, when the device has passed them.
    """

    def __init__(self, on_device: bool) -> None:
        self._new_mark: Callable[[], Mark] = cuda_mark if on_device else ClockMark
        self._borders: deque[Border] = deque()

    def enter(self, phase: str, tokens: int = 0, samples: int = 0) -> Border:
        """Begin a phase; ``tokens`` and ``samples`` are what the phase that ends here has completed."""
        self._borders.append(Border(self._new_mark(), phase, (tokens, samples)))
        return self._borders[-1]

    def relabel(self, phase: str, since: str | None = None) -> None:
        """Count what has ended as another phase that completes nothing: back to the last ``since``, or all unread."""
        for i in range(len(self._borders) - 2, -1, -1):
            found = self._borders[i].begins == since
            self._borders[i].begins = phase
            self._borders[i + 1].done = (0, 0)
            if found:
                return

    def read(self, until: Border | None = None) -> tuple[dict[str, float], int, int]:
        """Return and forget what came since the last call: seconds by phase, tokens, samples.

        Args:
            until: Up to here, which the device is waited for to pass; None is the newest border.
        """
        seconds: dict[str, float] = {}
        tokens = samples = 0
        if not self._borders:
            return seconds, tokens, samples
        until = until or self._borders[-1]
        until.mark.synchronize()
        while self._borders[0] is not until:
            begun = self._borders.popleft()
            ended = self._borders[0]
            duration = begun.mark.elapsed_time(ended.mark) / 1e3
            seconds[begun.begins] = seconds.get(begun.begins, 0.0) + duration
            tokens, samples = tokens + ended.done[0], samples + ended.done[1]
        return seconds, tokens, samples
