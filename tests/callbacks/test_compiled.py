"""With all callbacks a compiled run has the graphs, the breaks and the losses that it has without them."""

import pytest
import torch
from timed_run import train
from torch._dynamo.utils import counters

pytestmark = pytest.mark.slow
RUN = {"strategy": "single", "rows": [[4] * 6], "steps": 6, "every": 2}


def compiled(**case) -> tuple[dict, dict]:
    torch._dynamo.reset()
    counters.clear()
    result = train({**RUN, "module": {"compile_blocks": True}, **case})
    return result, {"graphs": dict(counters["stats"]), "breaks": dict(counters["graph_break"])}


def test_no_graph_breaks_and_no_recompiles(tmp_path):
    alone, without = compiled(monitored=False, validate_every=3)
    watched, found = compiled(router=2, validate_every=3, logdir=str(tmp_path))
    assert without["graphs"]["unique_graphs"] > 0
    assert found == without
    assert found["breaks"] == {}
    assert watched["points"]["train/loss"] == alone["points"]["train/loss"]
    assert set(watched["points"]["router/entropy_token/mean"]) == {1, 3, 5}
    # Micro-batches that compiled are no training: the first, and none later.
    assert [watched["points"]["time/compile"][step] > 0 for step in (1, 3, 5)] == [True, False, False]


def test_a_later_compilation_does_not_count_as_training():
    """A batch of another size is compiled anew (for any size, once): its time and tokens do not count."""
    result, found = compiled(rows=[[4, 4, 4, 2, 4, 4]])
    assert found["graphs"]["unique_graphs"] > 1
    assert [result["points"]["time/compile"][step] > 0 for step in (1, 3, 5)] == [True, True, False]
