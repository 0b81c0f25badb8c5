"""Times, memory, the ceilings of this machine, and what it is. May import torch, triton and the standard library.

On CUDA: events around each call, the L2 cache overwritten before it, medians. On the CPU: `time.perf_counter`.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

FEWEST_CALLS, MOST_CALLS = 5, 1000
UNKNOWN_COMMIT = "unknown (no git checkout; MHF_COMMIT says it)"
L2_FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU
NVIDIA_SMI = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "highest SM clock": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power": "power.draw",
    "power limit": "power.limit",
    "temperature in C": "temperature.gpu",
}


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each visible GPU; CUDA is not started."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(index) for index in range(count)]


def commit() -> str | None:
    """Return the commit of the code, twelve digits: ``MHF_COMMIT``, else that of the checkout; None without history."""
    if "MHF_COMMIT" in os.environ:
        return re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", os.environ["MHF_COMMIT"])
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class OutOfMemoryError(Exception):
    """The call did not fit into the memory of the device."""


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn the errors of the allocators into `OutOfMemoryError`."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError from error


class Stopwatch:
    """Takes medians of repeated calls on one device; `seconds` is about how long each may go on repeating."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        on_cuda = device.type == "cuda"
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if on_cuda else None

    def medians(self, *phases: Callable[[], object], reset: Callable[[], object] | None = None) -> list[float]:
        """Return the median seconds of each phase, and, last, of all of them together.

        A repeat runs the phases one after the other; `reset` runs before them, outside the time.
        """
        repeat = self._repeat_on_cpu if self._flush is None else self._repeat_on_cuda
        times: list[list[float]] = []
        started, calls = 0.0, 0
        while len(times) < max(calls, 2):
            if reset is not None:
                reset()
            times.append(repeat(phases))
            if len(times) == 1:  # the first call compiles and allocates, and the second says how many fit
                started = time.perf_counter()
            elif len(times) == 2:
                fitting = self.seconds / max(time.perf_counter() - started, 1e-9)
                calls = 2 + math.ceil(min(max(fitting, FEWEST_CALLS), MOST_CALLS))
        columns = [*zip(*times[2:], strict=True), [sum(row) for row in times[2:]]]
        return [statistics.median(column) for column in columns]

    def median(self, call: Callable[[], object]) -> float:
        """Return the median seconds of one call."""
        return self.medians(call)[0]

    def _repeat_on_cpu(self, phases: tuple[Callable[[], object], ...]) -> list[float]:
        times = []
        for phase in phases:
            started = time.perf_counter()
            phase()
            times.append(time.perf_counter() - started)
        return times

    def _repeat_on_cuda(self, phases: tuple[Callable[[], object], ...]) -> list[float]:
        assert self._flush is not None
        self._flush.zero_()  # also gives the host time to launch ahead
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        events[0].record()
        for phase, event in zip(phases, events[1:], strict=True):
            phase()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def as_graph(calls: Callable[[], object]) -> Callable[[], object]:
    """Capture calls into a CUDA graph, after a first run that compiles; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def inference_cost(module: nn.Module, inputs: tuple[Tensor, ...], stopwatch: Stopwatch) -> dict[str, float]:
    """Return `forward_ms` under `no_grad`, and on CUDA `inference_peak_mib`, above inputs and weights, with the output.

    Raises:
        OutOfMemoryError: it did not fit.
    """

    def forward() -> None:
        with torch.no_grad():
            module(*inputs)

    with out_of_memory():
        cost = {"forward_ms": 1e3 * stopwatch.median(forward)}
        if stopwatch.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            forward()
            cost["inference_peak_mib"] = _mib(torch.cuda.max_memory_allocated() - before)
    return cost


def training_cost(module: nn.Module, inputs: tuple[Tensor, ...], stopwatch: Stopwatch) -> dict[str, float]:
    """Return `backward_ms` and `forward_backward_ms`, with gradients of inputs and weights; and on CUDA the memory.

    `training_peak_mib` is above inputs, weights and the incoming gradient, and includes the gradients that come out.
    `kept_mib` is what is allocated after the forward, without the output; `kept_and_output_mib` with it.

    Raises:
        OutOfMemoryError: it did not fit.
    """
    outputs: list[Tensor] = []  # of the forward whose backward is due

    def reset() -> None:
        outputs.clear()
        for tensor in (*inputs, *module.parameters()):
            tensor.grad = None

    def forward() -> None:
        outputs.append(module(*inputs))

    def backward() -> None:
        torch.autograd.backward(outputs.pop(), grad)

    with out_of_memory():
        forward()
        grad = torch.randn_like(outputs[0])
        _, backward_s, forward_backward_s = stopwatch.medians(forward, backward, reset=reset)
        cost = {"backward_ms": 1e3 * backward_s, "forward_backward_ms": 1e3 * forward_backward_s}
        reset()
        if stopwatch.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            forward()
            kept_and_output = torch.cuda.memory_allocated() - before
            cost["kept_mib"] = _mib(kept_and_output - outputs[0].untyped_storage().nbytes())
            cost["kept_and_output_mib"] = _mib(kept_and_output)
            backward()
            cost["training_peak_mib"] = _mib(torch.cuda.max_memory_allocated() - before)
            reset()
    return cost


def _mib(size: int) -> float:
    return size / 2**20


def release(device: torch.device) -> None:
    """Drop what the last measurement left behind: compiled code and free blocks of memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gemm_flops_per_s(dtype: torch.dtype, stopwatch: Stopwatch) -> float:
    """Return the FLOP/s of `torch.matmul` of square matrices 8192 wide (512 on the CPU): the ceiling."""
    n = 512 if stopwatch.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=stopwatch.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / stopwatch.median(lambda: torch.matmul(a, b))


def copy_bytes_per_s(stopwatch: Stopwatch) -> float:
    """Return the bytes read and written per second by a copy of 1 GiB (32 MiB on the CPU)."""
    size = 2**25 if stopwatch.device.type == "cpu" else 2**30
    source, target = (torch.zeros(size, dtype=torch.int8, device=stopwatch.device) for _ in range(2))
    return 2 * size / stopwatch.median(lambda: target.copy_(source))


class Session(NamedTuple):
    """What the measurements of one command have in common.

    Attributes:
        stopwatch: on the GPU where there is one.
        dtype: of what is measured.
        about: columns that every row of the results has.
    """

    stopwatch: Stopwatch
    dtype: torch.dtype
    about: dict[str, str]


def begin(output: Path, results: Sequence[str], dtype: torch.dtype | None, seconds: float) -> Session:
    """Make the folder of the results, write and print what the figures depend on, and seed.

    Args:
        output: the folder.
        results: files that the command will write there, beside environment.json.
        dtype: None: bfloat16 on a GPU, float32 on the CPU.
        seconds: about how long each call may be repeated.

    Raises:
        FileExistsError: the folder holds results already.
    """
    for name in (*results, "environment.json"):
        if (output / name).exists():
            raise FileExistsError(f"{output / name} exists; name another --output, or move the old results away")
    output.mkdir(parents=True, exist_ok=True)
    stopwatch = Stopwatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"), seconds)
    if dtype is None:
        dtype = torch.float32 if stopwatch.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    facts = environment(dtype, stopwatch)
    with (output / "environment.json").open("x") as file:
        json.dump(facts, file, indent=2)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n", flush=True)
    return Session(stopwatch, dtype, {name: facts[name] for name in ("device", "dtype", "torch", "triton")})


def say(message: str) -> None:
    """Report progress or an error to stderr."""
    print(message, file=sys.stderr, flush=True)


def refuse(error: Exception) -> int:
    """Say what is wrong, and return the exit code of wrong use."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:  # the system's; ours say it themselves
        is_there = isinstance(error, FileExistsError)
        why = "it is there already, and nothing is overwritten; move it away" if is_there else error.strerror
        text = f"{error.filename}: {why}"
    say(f"error: {text}")
    return 2


def environment(dtype: torch.dtype, stopwatch: Stopwatch) -> dict[str, str]:
    """Return what the figures depend on: device, driver, versions, and clocks and power while GEMMs run."""
    device = stopwatch.device
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "MHF_BACKEND": os.environ.get("MHF_BACKEND") or "auto",
        "commit": commit() or UNKNOWN_COMMIT,
    }
    if device.type == "cpu":
        return {**facts, "threads": str(torch.get_num_threads())}
    return {**facts, "CUDA": str(torch.version.cuda), **_nvidia_smi(dtype, stopwatch)}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


def _nvidia_smi(dtype: torch.dtype, stopwatch: Stopwatch) -> dict[str, str]:
    """Ask nvidia-smi while about two seconds of GEMMs run: the clocks of an idle GPU say nothing."""
    device, n = stopwatch.device, 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    for _ in range(math.ceil(2 * gemm_flops_per_s(dtype, stopwatch) / (2 * n**3))):
        torch.matmul(a, a, out=out)
    uuid = "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(NVIDIA_SMI.values())}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return dict(zip(NVIDIA_SMI, (value.strip() for value in answer.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return dict.fromkeys(NVIDIA_SMI, "unknown (nvidia-smi did not say)")
    finally:
        torch.cuda.synchronize(device)
