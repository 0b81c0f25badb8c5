"""The estimate of what callbacks cost: exact where nothing disturbs, and near it where a host does."""

import random
from collections import defaultdict

import pytest
from step_costs import PLACES, costs, interval, is_on, kinds_of_steps

EVERY, PICTURES, LOOKS = 5, 20, {15, 100, 200, 300, 400}
PLACE_MS = dict(zip(PLACES, (2.0, 5.0, 0.0), strict=True))  # Lightning's own
LOGGING_MS = dict(zip(PLACES, (1.5, 0.5, 1.0), strict=True))
ALONE, ORDINARY, LOOK_MS, POINTS_MS, PICTURE_MS = 120.0, 0.25, 40.0, 3.0, 0.5


def schedule() -> tuple[list[bool], list[str]]:
    on = [is_on(step - 1, EVERY) for step in range(1, 421)]
    return on, kinds_of_steps(on, LOOKS, EVERY, PICTURES)


def test_a_turn_has_a_logging_step_and_those_after_it():
    on, kinds = schedule()
    assert "".join("+" if x else "-" for x in on[13:43]) == "+" * 10 + "-" * 10 + "+" * 10
    assert all(on[step - 1] for step in LOOKS)
    assert kinds[13:20] == [
        "other, on",
        "logging, look",
        "after logging, look",
        "two after logging, pictures",
        "other, pictures",
        "other, pictures",
        "logging, pictures",
    ]
    pictures = [kind for kind in kinds[:100] if kind.endswith("pictures")]
    assert len(pictures) == PICTURES
    assert kinds[99:101] == ["logging, look", "after logging, look"]


@pytest.mark.parametrize(("disturbed", "tolerance"), [(0.0, 1e-9), (0.4, 0.002)])
def test_costs(disturbed, tolerance):
    random.seed(0)
    times = defaultdict(list)
    for kind in schedule()[1][45:]:
        place, what = kind.split(", ")
        ms = ALONE + PLACE_MS.get(place, 0.0)
        ms += (ORDINARY if place == "other" else LOGGING_MS[place]) if what != "off" else 0.0
        ms += {"look": POINTS_MS if place == "after logging" else LOOK_MS, "pictures": PICTURE_MS}.get(what, 0.0)
        ms += random.uniform(0, 80) if random.random() < disturbed else random.uniform(0, disturbed)
        times[kind].append(ms)
    found = costs(times, log_every=10, look_every=500, pictures=PICTURES)
    alone = ALONE + sum(PLACE_MS.values()) / 10
    look = LOOK_MS + POINTS_MS + PICTURES * PICTURE_MS
    overhead = (sum(LOGGING_MS.values()) / 10 + 0.7 * ORDINARY + look / 500) / alone
    assert found.overhead == pytest.approx(overhead, abs=tolerance)
    low, high = interval(times, log_every=10, look_every=500, pictures=PICTURES)
    assert low - 1e-9 <= overhead <= high + 1e-9
    assert 0 < high - low < 0.01 if disturbed else high - low < 1e-9
    assert found.alone == pytest.approx(alone, abs=1 if disturbed else 1e-9)
    if not disturbed:
        assert (found.ordinary, found.logging, found.look) == pytest.approx((ORDINARY, sum(LOGGING_MS.values()), look))
