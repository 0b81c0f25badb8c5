"""The table of nodes, from findings written by hand. tests/slurm checks real nodes."""

from mhf_lightning.preflight.__main__ import show
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
