"""Nodes that follow the first one's orders: tell the time, and all-reduce in groups. Nothing waits without a limit.

Orders and answers go through a TCPStore on the first node. A measurement has a process of its own on each node, since a
process group that fails can hang, or end its process.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

MIB = 2**20
PROBE_BYTES = MIB
MESSAGE_BYTES = {"gloo": 16 * MIB, "nccl": 256 * MIB}
SECONDS_PER_MEASUREMENT = 1.0
PINGS = 5
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])  # imports torch once


class Link:
    """One node's end of the store.

    Raises:
        OSError: The first node does not answer in time.
        RuntimeError: The same, later on.
    """

    def __init__(self, rank: int, size: int, address: str, port: int, seconds: float) -> None:
        self.rank, self.size, self.seconds = rank, size, seconds
        self._place = ("localhost" if rank == 0 else address), port
        if rank > 0:
            wait_for_port(address, port, seconds)
        limit = timedelta(seconds=seconds)
        self.store = dist.TCPStore(*self._place, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        self._orders = [0] * size

    def put(self, key: str, value: Any) -> None:
        """Write a value."""
        self.store.set(key, json.dumps(value))

    def get(self, key: str, seconds: float) -> Any:
        """Wait for a value."""
        self.store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        return json.loads(self.store.get(key))

    def get_all(self, keys: dict[int, str], seconds: float, waiting: Callable[[list[int]], None] | None = None) -> dict:
        """Return the values that come in time, by rank; ``waiting`` is told once who is awaited after 5 seconds."""
        found: dict[int, Any] = {}
        begun = time.monotonic()
        while len(found) < len(keys) and time.monotonic() - begun < seconds:
            for rank, key in keys.items():
                if rank not in found and self.store.check([key]):
                    found[rank] = self.get(key, self.seconds)
            if waiting and time.monotonic() - begun > 5 and len(found) < len(keys):
                waiting([rank for rank in keys if rank not in found])
                waiting = None
            time.sleep(0.01)
        return found

    def order(self, rank: int, **order: Any) -> str:
        """Give another node an order (on the first node); return the key of its answer."""
        self._orders[rank] += 1
        self.put(f"order/{rank}/{self._orders[rank]}", order)
        return f"answer/{rank}/{self._orders[rank]}"

    def follow(self) -> None:
        """Follow the first node's orders until the last one (on the others)."""
        number = 0
        while True:
            number += 1
            # The first node waits for silent ones in between.
            order = self.get(f"order/{self.rank}/{number}", 4 * self.seconds)
            answer = self.bandwidth(**order["group"]) if order["do"] == "bandwidth" else time.time()
            self.put(f"answer/{self.rank}/{number}", answer)
            if order["do"] == "end":
                return

    def bandwidth(self, name: str, ranks: list[int], backend: str) -> float | str:
        """All-reduce with the other nodes of a group: bus bandwidth in GB/s, or why there is none.

        Args:
            name: Of the group, used once.
            ranks: Its nodes.
            backend: ``gloo``, or ``nccl`` on the first GPU of each node.
        """
        answer, end = PROCESSES.Pipe(duplex=False)
        group = (name, ranks.index(self.rank), len(ranks), backend)
        process = PROCESSES.Process(target=join_group, args=(end, *self._place, self.seconds, *group), daemon=True)
        process.start()
        end.close()
        try:
            result = answer.recv() if answer.poll(2 * self.seconds) else "hangs"
        except EOFError:
            result = "its process died"
        process.kill()
        process.join()
        if isinstance(result, str):
            print(f"preflight: {socket.gethostname()}, all-reduce {name}: {result}", file=sys.stderr, flush=True)
        return result

    def clock_skew(self, rank: int) -> tuple[float, float]:
        """Return how far another node's clock is ahead of this one's, and the uncertainty, in seconds."""
        skews = []
        for _ in range(PINGS):
            asked = time.time()
            there = self.get(self.order(rank, do="clock"), self.seconds)
            answered = time.time()
            skews.append(((answered - asked) / 2, there - (asked + answered) / 2))
        uncertainty, skew = min(skews)
        return skew, uncertainty

    def measure(self, groups: list[list[int]], name: str, backend: str) -> list[float | None]:
        """Let disjoint groups measure at the same time (on the first node); None where any of a group failed."""
        keys: dict[int, str] = {}
        orders: list[dict[str, Any]] = [
            {"name": f"{name}/{i}", "ranks": ranks, "backend": backend} for i, ranks in enumerate(groups)
        ]
        own: float | str | None = None
        for order, ranks in zip(orders, groups, strict=True):
            keys.update({rank: self.order(rank, do="bandwidth", group=order) for rank in ranks if rank != self.rank})
        for order, ranks in zip(orders, groups, strict=True):
            if self.rank in ranks:
                own = self.bandwidth(**order)
        answers = self.get_all(keys, 2 * self.seconds + 5)
        answers[self.rank] = own
        return [lowest(answers.get(rank) for rank in ranks) for ranks in groups]


def wait_for_port(address: str, port: int, seconds: float) -> None:
    """Return when something listens there; torch's own wait is twice as long, and prints stacks of C++.

    Raises:
        OSError: Nothing does in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def lowest(values: Iterable[float | str | None]) -> float | None:
    """Return the smallest, or None where one is no number."""
    numbers = [value if isinstance(value, float) else None for value in values]
    return None if None in numbers else min(value for value in numbers if value is not None)


def join_group(
    end: Connection, address: str, port: int, seconds: float, name: str, rank: int, size: int, backend: str
) -> None:
    """Measure in a process of its own, and send the bandwidth or the error."""
    try:
        limit = timedelta(seconds=seconds)
        store = dist.PrefixStore(name, dist.TCPStore(address, port, timeout=limit, wait_for_workers=False))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        end.send(measure_all_reduce(backend))
        dist.destroy_process_group()
    except Exception as error:  # of torch, gloo or NCCL: of many types
        end.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def measure_all_reduce(backend: str) -> float:
    """Return the bus bandwidth of all-reduces over the current process group in GB/s.

    A message of 1 MiB tells how many large ones take about a second; over a slow link it is all that is sent.
    """
    size, device = dist.get_world_size(), torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)

    def seconds(num_bytes: int, times: int) -> float:  # the median, each time of the slowest node
        message = torch.zeros(num_bytes // 4, device=device)
        dist.barrier()
        taken = torch.zeros(times, device=device)
        for i in range(times):
            begun = time.perf_counter()
            dist.all_reduce(message)
            if backend == "nccl":
                torch.cuda.synchronize(device)
            taken[i] = time.perf_counter() - begun
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken.median())

    seconds(PROBE_BYTES, 1)  # pays for the connections
    num_bytes, taken = PROBE_BYTES, seconds(PROBE_BYTES, 1)
    expected = taken * MESSAGE_BYTES[backend] / PROBE_BYTES
    if expected < 2 * SECONDS_PER_MEASUREMENT:
        num_bytes = MESSAGE_BYTES[backend]
        taken = seconds(num_bytes, max(1, min(20, int(SECONDS_PER_MEASUREMENT / expected))))
    return num_bytes * 2 * (size - 1) / size / taken / 1e9


def rounds(ranks: list[int]) -> list[list[list[int]]]:
    """Return rounds of disjoint pairs in which each node meets each other once (the circle method)."""
    places: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    result = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        opposite = zip(places[:half], reversed(places[half:]), strict=True)
        result.append([sorted((a, b)) for a, b in opposite if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return result
