"""Checks of a cluster's nodes before a long run; one process a node: ``srun --ntasks-per-node=1 python -m ...``.

- ``node.py``: what a node can say of itself: GPUs, disks, shared memory. Standard library and torch.
- ``network.py``: orders from the first node to all, clock skew, and all-reduce between pairs of nodes and over all.
- ``verdict.py``: from the answers to a list of problems that name nodes. No I/O.
- ``__main__.py``: the command.

Imports neither Lightning nor the rest of the package.
"""
