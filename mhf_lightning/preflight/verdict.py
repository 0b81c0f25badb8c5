"""From the nodes' answers to problems that name nodes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mhf_lightning.preflight.node import Node

MAX_SKEW_SECONDS = 1.0


@dataclass
class Findings:
    """What was found.

    Attributes:
        names: Of all nodes, by rank.
        nodes: Reports of those that answered, by rank.
        skews: Clock ahead of the first node's, and its uncertainty, in seconds.
        backend: ``gloo`` or ``nccl``.
        pairs: Bus bandwidth of pairs of nodes in GB/s; None where they could not all-reduce.
        together: The same over all nodes that could be measured.
    """

    names: list[str]
    nodes: dict[int, Node]
    skews: dict[int, tuple[float, float]] = field(default_factory=dict)
    backend: str = "gloo"
    pairs: dict[tuple[int, int], float | None] = field(default_factory=dict)
    together: float | None = None

    def best(self, rank: int) -> float | None:
        """Return the bandwidth of a node's best pair."""
        return max((value for pair, value in self.pairs.items() if rank in pair and value is not None), default=None)

    def hopeless(self, rank: int) -> bool:
        """Return whether two or more partners tried in vain, and none with success."""
        tried = sum(rank in pair for pair in self.pairs)
        return tried >= 2 and self.best(rank) is None


def problems(found: Findings, slow: float) -> list[tuple[str, str]]:
    """Return ``(node, what is wrong)``.

    A node is slow if its best pair has less than ``slow`` times the median of the nodes' best pairs: a slow node slows
    down all its partners, but none of their other pairs.
    """
    names, nodes = found.names, found.nodes
    silent = [rank for rank in range(len(names)) if rank not in nodes]
    wrong = [(names[rank], "did not answer") for rank in silent]
    if silent and len(nodes) == 1:
        wrong.append((names[0], "hears from no other node: is the cause here?"))
    wrong += [(names[rank], problem) for rank, node in nodes.items() for problem in node.problems]
    wrong += unlike_most(found)
    for rank, (skew, uncertainty) in found.skews.items():
        if abs(skew) - uncertainty > MAX_SKEW_SECONDS:
            wrong.append((names[rank], f"its clock is {skew:+.1f} s off that of {names[0]}"))
    cut_off = [rank for rank in nodes if len(nodes) > 1 and found.best(rank) is None]
    wrong += [(names[rank], "no all-reduce with any other node") for rank in cut_off]
    for (a, b), value in found.pairs.items():
        if value is None and a not in cut_off and b not in cut_off:
            wrong.append((f"{names[a]} and {names[b]}", "no all-reduce between them"))
    best = {rank: value for rank in nodes if (value := found.best(rank)) is not None}
    if best:
        median = statistics.median(best.values())
        for rank, value in best.items():
            if value < slow * median:
                wrong.append(
                    (names[rank], f"slow: {value:.3f} GB/s in its best pair, the nodes' median is {median:.3f}")
                )
    if len(nodes) - len(cut_off) > 1 and found.together is None:
        wrong.append(("all nodes", "no all-reduce over all of them"))
    return wrong


def unlike_most(found: Findings) -> list[tuple[str, str]]:
    """Return what differs from most other nodes: GPUs, driver, maximal clocks."""
    kinds: dict[str, Callable[[Node], str]] = {
        "GPUs": lambda node: f"{node.torch_gpus}",
        "GPU names": lambda node: ", ".join(sorted({gpu["name"] for gpu in node.gpus})),
        "GPU driver": lambda node: ", ".join(sorted({gpu["driver"] for gpu in node.gpus})),
        "maximal SM clock": lambda node: ", ".join(sorted({gpu["max_sm_clock"] for gpu in node.gpus})),
    }
    wrong = []
    for what, of in kinds.items():
        values = {rank: of(node) for rank, node in found.nodes.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        wrong += [
            (found.names[rank], f"{what}: {value or 'none'}; most nodes have {usual or 'none'}")
            for rank, value in values.items()
            if value != usual
        ]
    return wrong
