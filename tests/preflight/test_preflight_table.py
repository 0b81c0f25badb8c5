"""The table of nodes, from findings written by hand. tests/slurm checks real nodes."""

import pytest

from mhf_lightning.preflight.__main__ import main, show
from mhf_lightning.preflight.node import Node
from mhf_lightning.preflight.verdict import Findings


def test_the_slowest_clock_of_a_node_is_shown(capsys):
    """As a number: 990 MHz are less than 1980 MHz. nvidia-smi has words for what a GPU does not tell."""

    def node(*clocks: str) -> Node:
        gpu = {"name": "GPU", "driver": "1", "max_sm_clock": "1980"}
        return Node("host", gpus=[{**gpu, "sm_clock": clock} for clock in clocks], torch_gpus=len(clocks))

    found = Findings(["a", "b", "c"], {0: node("1980", "990"), 1: node("[N/A]", "1200"), 2: node("[N/A]", "[N/A]")})
    show(found, [])
    printed = capsys.readouterr().out
    assert [shown in printed for shown in ("990 of 1980", "1200 of 1980", "[N/A] of 1980")] == [True] * 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--timeout", "nan"], "--timeout is nan; give seconds"),
        (["--json", "/nowhere/found.json"], "--json /nowhere/found.json lies in no folder that there is"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert message in capsys.readouterr().err
