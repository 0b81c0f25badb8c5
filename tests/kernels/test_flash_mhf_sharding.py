"""The op on DTensors, two gloo processes: every way to split it gives what one process gives, without communication."""

from __future__ import annotations

import json
import os
import socket
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

NAMES = ("q", "k", "u", "v", "r")
ALL = "qkuvr"  # r stands for the router too

# name: (sizes B, L, H, H_kuv, E), dimensions along which q, k, u, v, r are split, which gradients are wanted.
CASES = {
    # Two cases below have the same shapes and placements: DTensor must not reuse what it decided for these gradients.
    "heads, weights frozen": ((2, 5, 4, 4, 3), (2, 0, 0, 0, 2), "qr"),
    "heads, only the weights": ((2, 5, 4, 4, 3), (2, 0, 0, 0, 2), "kuv"),
    "batch, weights frozen": ((2, 5, 4, 4, 3), (0, None, None, None, 0), "q"),
    "replicate": ((2, 5, 4, 4, 3), (None, None, None, None, None), ALL),
    "batch": ((2, 5, 4, 4, 3), (0, None, None, None, 0), ALL),
    "length, unevenly": ((2, 5, 4, 4, 3), (1, None, None, None, 1), ALL),
    "heads": ((2, 5, 4, 4, 3), (2, 0, 0, 0, 2), ALL),
    "heads, unevenly": ((2, 5, 3, 3, 3), (2, 0, 0, 0, 2), ALL),
    "grouped heads": ((2, 5, 4, 2, 3), (2, 0, 0, 0, 2), ALL),
    "sub-networks, unevenly": ((2, 5, 4, 4, 3), (None, 1, 1, 1, 3), ALL),
    "heads of the queries, weights replicated": ((2, 5, 4, 4, 2), (2, None, None, None, 2), ALL),
}
# A split that would part a query head from its K/U/V head: correct all the same, with communication.
REDISTRIBUTED = {
    "three K/U/V heads on two ranks": ((2, 5, 6, 3, 2), (2, 0, 0, 0, 2), ALL),
}
# The same with the router's weight in place of r.
ROUTED = {
    "routed, replicate": ((2, 5, 4, 4, 3), (None, None, None, None, None), ALL),
    "routed, batch": ((2, 5, 4, 4, 3), (0, None, None, None, None), ALL),
    "routed, batch, weights frozen": ((2, 5, 4, 4, 3), (0, None, None, None, None), "q"),
    "routed, length, unevenly": ((2, 5, 4, 4, 3), (1, None, None, None, None), ALL),
    "routed, grouped heads": ((2, 5, 4, 2, 3), (2, 0, 0, 0, 0), ALL),
}


def inputs_of(sizes: tuple[int, ...], wanted: str, routed: bool) -> list[torch.Tensor]:
    batch, length, heads, kuv_heads, subnetworks = sizes
    generator = torch.Generator().manual_seed(0)
    weights = (kuv_heads, subnetworks, 6, 8)
    gate = (heads, 8, subnetworks) if routed else (batch, length, heads, subnetworks)
    shapes = ((batch, length, heads, 8), weights, weights, weights, gate)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_(name in wanted) for name, x in zip(NAMES, tensors, strict=True)]


def check(mesh, sizes, dims, wanted, *, communicates: bool, compiled: bool = False, routed: bool = False) -> None:
    from mhf_kernels import flash_mhf
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    def function(q, k, u, v, gate):
        return flash_mhf(q, k, u, v, router=gate) if routed else flash_mhf(q, k, u, v, gate)

    inputs = inputs_of(sizes, wanted, routed)
    expected = function(*inputs)
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * target).sum().backward()

    def place(x, dim):
        return distribute_tensor(x.detach(), mesh, [Replicate() if dim is None else Shard(dim)])

    split = [place(x, dim).requires_grad_(x.requires_grad) for x, dim in zip(inputs, dims, strict=True)]
    op = torch.compile(function, fullgraph=True) if compiled else function
    with nullcontext() if compiled else CommDebugMode() as forward_traffic:  # torch.compile refuses the debug mode
        o = op(*split)
    grad_o = place(target, dims[0])  # dO is split as Q is
    with CommDebugMode() as backward_traffic:
        grads = torch.autograd.grad(o, [x for x in split if x.requires_grad], grad_o)
    if not compiled:
        counts = forward_traffic.get_total_counts(), backward_traffic.get_total_counts()
        assert (sum(counts) > 0) == communicates, counts
    torch.testing.assert_close(o.full_tensor(), expected.detach())
    for name, x, grad in zip(wanted, [x for x in inputs if x.requires_grad], grads, strict=True):
        torch.testing.assert_close(grad.full_tensor(), x.grad, msg=lambda m, name=name: f"d{name}: {m}")


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    runs = {name: {"case": case, "communicates": False} for name, case in CASES.items()}
    runs |= {name: {"case": case, "communicates": True} for name, case in REDISTRIBUTED.items()}
    runs |= {name: {"case": case, "communicates": False, "routed": True} for name, case in ROUTED.items()}
    runs["compiled heads"] = {"case": CASES["heads"], "communicates": False, "compiled": True}
    results = {}
    for name, run in runs.items():
        try:
            check(mesh, *run.pop("case"), **run)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    """What went wrong in each case, on each rank."""
    folder = tmp_path_factory.mktemp("sharding")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(folder)), nprocs=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*CASES, *REDISTRIBUTED, *ROUTED, "compiled heads"])
def test_split_equals_one_process(name, results):
    assert [rank[name] for rank in results] == ["", ""]


def test_the_package_works_without_torch_distributed(monkeypatch):
    from mhf_kernels import sharding

    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "tensor", None)
    sharding.register()


def test_heads_are_split_evenly_or_not_at_all():
    from mhf_kernels.sharding import _splits_evenly

    assert _splits_evenly(4, (2,))
    assert _splits_evenly(4, (2, 2))
    assert _splits_evenly(2, (4,))  # DTensor refuses more ranks than heads
    assert not _splits_evenly(3, (2,))
    assert not _splits_evenly(6, (2, 2))  # 2, 1, 2, 1 heads of K against 12 / 4 of Q
