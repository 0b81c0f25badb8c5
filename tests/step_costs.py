"""What callbacks cost a step, worked out from steps with and without them in one run. Standard library only."""

from __future__ import annotations

import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

# Where a logging step's work falls: it is begun in the step, and finished in the turns of the two after it.
PLACES = ("logging", "after logging", "two after logging")


def is_on(step: int, every: int) -> bool:
    """Return whether the callbacks see what comes after a step: in turns of ``every`` steps on, off, off, on ...

    A turn begins before its logging step and ends behind the last of its ``PLACES``.
    """
    return (step + every // 2) // every % 4 in (0, 3)


def kinds_of_steps(on: Sequence[bool], looks: Collection[int], every: int, pictures: int) -> list[str]:
    """Return the kind of each step, ``PLACE, WHAT``, where the place is one of ``PLACES`` or ``other``.

    What is ``off``, or ``look`` (at the routers, and the writing of its points), ``pictures`` (one is drawn) or ``on``.

    Args:
        on: Of each step, the first is 1, whether the callbacks were on; what they deferred waits while they are off.
        looks: Steps that looked at the routers.
        every: A logging step is one whose number it divides.
        pictures: How many steps a look's pictures take, from the second one after it.
    """
    kinds, left = [], 0  # turns that the last look still takes
    for step, with_callbacks in enumerate(on, 1):
        what = "off"
        if with_callbacks:
            what = "look" if step in looks or left > pictures else "pictures" if left else "on"
            left = pictures + 1 if step in looks else max(left - 1, 0)
        place = PLACES[step % every] if step % every < len(PLACES) else "other"
        kinds.append(f"{place}, {what}")
    return kinds


@dataclass
class Costs:
    """In the unit of the times.

    Attributes:
        alone: A step without callbacks.
        ordinary: What they add to a step that does nothing of a logging step's work.
        logging: What they add to a logging step, and to those after it.
        look: What a look adds to that, with its pictures.
        overhead: All of it over ``alone``.
    """

    alone: float
    ordinary: float
    logging: float
    look: float
    overhead: float


def costs(times: Mapping[str, Sequence[float]], log_every: int, look_every: int, pictures: int) -> Costs:
    """Return what the callbacks cost where a step is logged every ``log_every`` and a look taken every ``look_every``.

    Of each kind of step the lower quartile is compared. What disturbs a shared host only adds to a step, so this is
    nearly an undisturbed one, also of few; a cost that comes in fewer than three of four steps of a kind is not seen.

    Args:
        times: Of the steps of each kind, of :func:`kinds_of_steps`.
        log_every: Steps.
        look_every: Steps.
        pictures: How many steps a look's pictures take.
    """
    low = {kind: statistics.quantiles(values, n=4, method="inclusive")[0] for kind, values in times.items()}

    def added(place: str, what: str, to: str) -> float:
        return low[f"{place}, {what}"] - low[f"{place}, {to}"]

    def mean(logging: float, other: float) -> float:
        return (logging + (log_every - len(PLACES)) * other) / log_every

    alone = mean(sum(low[f"{place}, off"] for place in PLACES), low["other, off"])
    ordinary, logging = added("other", "on", "off"), sum(added(place, "on", "off") for place in PLACES)
    picture = mean(sum(added(place, "pictures", "on") for place in PLACES), added("other", "pictures", "on"))
    look = sum(added(place, "look", "on") for place in PLACES[:2]) + pictures * picture
    overhead = (mean(logging, ordinary) + look / look_every) / alone
    return Costs(alone, ordinary, logging, look, overhead)


def interval(
    times: Mapping[str, Sequence[float]], log_every: int, look_every: int, pictures: int, draws: int = 400
) -> tuple[float, float]:
    """Return a 95% bootstrap interval of the overhead; the arguments are those of :func:`costs`."""
    rng = random.Random(0)
    found = []
    for _ in range(draws):
        drawn = {kind: rng.choices(values, k=len(values)) for kind, values in times.items()}
        found.append(costs(drawn, log_every, look_every, pictures).overhead)
    cuts = statistics.quantiles(found, n=40)
    return cuts[0], cuts[-1]
