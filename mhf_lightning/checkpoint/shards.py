"""Which rank writes which slice of which tensor; saving in the background; loading under another layout.

Imports ``files.py``, ``folder.py``, ``state.py`` and torch. Slices are cut by the planners of
torch.distributed.checkpoint, which know DTensors; its storage layer, whose metadata is a pickle, is not used.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from mhf_lightning.checkpoint.files import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointError,
    FileEntry,
    TensorFile,
    read_json,
    write_json,
    write_tensors,
)
from mhf_lightning.checkpoint.folder import Manifest, abandon, begin, commit, point_latest, prune, temporary
from mhf_lightning.checkpoint.state import decode

INDEX = "index.json"
TRAINER = "trainer.json"
TRAINER_TENSORS = "trainer.safetensors"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")

T = TypeVar("T")


class Ranks:
    """The processes that save together, and decisions that all of them take alike.

    Its collectives run on a CPU group of their own, so that they can run beside training. Making one is a collective.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.group = dist.new_group(backend="gloo") if distributed else None
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    def every(self, work: Callable[[], T]) -> list[T]:
        """Do the work on every rank and return all results everywhere; an error on one rank is raised on all."""
        mine: tuple[Any, str | None] = (None, None)
        cause = None
        try:
            mine = (work(), None)
        except Exception as error:
            cause, mine = error, (None, _message(error))
        results: list[Any] = [mine]
        if self.group is not None:
            results = [None] * self.size
            dist.all_gather_object(results, mine, group=self.group)
        messages = [message for _, message in results if message is not None]
        if messages:
            raise CheckpointError(messages[0]) from cause
        return [result for result, _ in results]

    def first(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 and return its result everywhere; an error is raised on all ranks."""
        outcome: list[Any] = [(None, None)]
        cause = None
        if self.rank == 0:
            try:
                outcome = [(work(), None)]
            except Exception as error:
                cause, outcome = error, [(None, _message(error))]
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        result, message = outcome[0]
        if message is not None:
            raise CheckpointError(message) from cause
        return result


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class SaveOptions:
    """How to save, besides what.

    Attributes:
        background: Copy the tensors and write them while training goes on.
        keep_last: Number of newest checkpoints that stay after this one is committed; None removes none.
        keep_every: Checkpoints of steps divisible by this stay too.
    """

    background: bool = False
    keep_last: int | None = None
    keep_every: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes.

    Attributes:
        tensors: The rank's slices by their names in its file.
        index: On rank 0, where every slice of every tensor will lie.
        trainer: On rank 0, the JSON state, and the tensors in it.
    """

    tensors: dict[str, Tensor]
    index: dict[str, Any]
    trainer: tuple[Any, dict[str, Tensor]]


class Staging:
    """CPU memory for the copies that are written beside training; kept, as new pages cost more than the copying."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, content: Snapshot) -> Snapshot:
        """Return a snapshot that training cannot change any more. It lasts until the next call."""
        state, tensors = content.trainer
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._kept = {name: self._copy_of(name, tensor.detach()) for name, tensor in content.tensors.items()}
        return Snapshot(dict(self._kept), content.index, (state, own))

    def _copy_of(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept.copy_(tensor)


def shard_name(rank: int) -> str:
    """The file of a rank."""
    return f"shard-{rank:05d}.safetensors"


def snapshot(state: dict[str, Tensor], trainer: tuple[Any, dict[str, Tensor]], ranks: Ranks) -> Snapshot:
    """Agree on who writes what (a collective). Replicated tensors are dealt out, so each is written once.

    Args:
        state: Tensors and DTensors by name; all ranks have the same names.
        trainer: JSON value, and the tensors in it; rank 0's is saved.
        ranks: Who saves.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def local() -> Any:
        planner.set_up_planner(state, is_coordinator=ranks.rank == 0)
        plan = planner.create_local_plan()
        items: list[Any] = plan.items
        filled = [item for item in items if 0 not in item.tensor_data.chunk.sizes]  # uneven shards may be empty
        return dataclasses.replace(plan, items=filled)

    plans = ranks.every(local)
    plans = ranks.first(lambda: planner.create_global_plan(plans)[0])
    tensors: dict[str, Any] = {_name_in_file(item): planner.resolve_data(item) for item in plans[ranks.rank].items}
    index: dict[str, Any] = {}
    if ranks.rank == 0:
        for rank, plan in enumerate(plans):
            for item in plan.items:
                about = item.tensor_data
                entry = index.setdefault(
                    item.index.fqn,
                    {"dtype": DTYPE_NAMES[about.properties.dtype], "shape": list(about.size), "chunks": []},
                )
                entry["chunks"].append(
                    {
                        "offsets": list(about.chunk.offsets),
                        "sizes": list(about.chunk.sizes),
                        "file": shard_name(rank),
                        "name": _name_in_file(item),
                    }
                )
    return Snapshot(tensors, index, trainer)


def _name_in_file(item: Any) -> str:
    about = item.tensor_data
    if about.chunk.sizes == about.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, about.chunk.offsets))}"


def write(path: Path, content: Snapshot, step: int, about: dict[str, Any], ranks: Ranks, options: SaveOptions) -> None:
    """Write and commit a checkpoint (a collective).

    Raises:
        CheckpointError: On every rank, when one of them failed; nothing is left, and older checkpoints are untouched.
    """
    folder = temporary(path)
    ranks.first(lambda: begin(path) and None)
    try:
        entries = ranks.every(lambda: _write_files(folder, content, ranks.rank))
        files = [entry for of_rank in entries for entry in of_rank]
        ranks.first(lambda: commit(path, Manifest(step, "sharded", files, about)))
    except CheckpointError:
        if ranks.rank == 0:
            abandon(path)
        raise
    ranks.first(lambda: after_commit(path, options))


def after_commit(path: Path, options: SaveOptions) -> None:
    """Move ``latest``, then remove the checkpoints that are not to be kept; failing at that is not worth the run."""
    try:
        point_latest(path)
    except (OSError, CheckpointError) as error:
        warnings.warn(f"{path} is saved, but 'latest' could not be moved to it: {error}", stacklevel=2)
    if options.keep_last is not None:
        try:
            prune(path.parent, options.keep_last, options.keep_every)
        except (OSError, CheckpointError) as error:
            warnings.warn(f"{path} is saved, but older ones could not be removed: {error}", stacklevel=2)


def _write_files(folder: Path, content: Snapshot, rank: int) -> list[FileEntry]:
    entries = [write_tensors(folder / shard_name(rank), content.tensors)] if content.tensors else []
    if rank == 0:
        state, tensors = content.trainer
        entries += [write_json(folder / INDEX, content.index), write_json(folder / TRAINER, state)]
        entries += [write_tensors(folder / TRAINER_TENSORS, tensors)]
    return entries


class Saver:
    """Runs saves one after the other, at most one at a time, beside training where asked to.

    Attributes:
        staging: For what the next of them writes, free when no save is running.
    """

    def __init__(self) -> None:
        self.staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def wait(self) -> None:
        """Return when no save is running.

        Raises:
            CheckpointError: The last one failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def run(self, work: Callable[[], None], background: bool) -> None:
        """Wait for the previous save, then do this one."""
        self.wait()
        self._running = self._thread.submit(work)
        if not background:
            self.wait()


def read_trainer(folder: Path) -> dict[str, Any]:
    """Return the state of a verified checkpoint that is not in shards.

    Raises:
        CheckpointError: It is damaged; the message names the file.
    """
    path = folder / TRAINER
    file = TensorFile(folder / TRAINER_TENSORS)
    try:
        state = decode(read_json(path), {name: file.read(name) for name in file.names()})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: it is no dictionary")
    return state


class Reader:
    """The tensors of a verified checkpoint, to be read under any layout. Nothing in its files is executed.

    Raises:
        CheckpointError: The index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata: dict[str, TensorStorageMetadata] = {}
        self._where: dict[tuple[str, tuple[int, ...]], tuple[str, str]] = {}
        self._files: dict[str, TensorFile] = {}
        path = folder / INDEX
        try:
            for fqn, entry in read_json(path).items():
                self._add(fqn, entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def _add(self, fqn: str, entry: dict[str, Any]) -> None:
        shape = torch.Size(entry["shape"])
        chunks, volume = [], 0
        for chunk in entry["chunks"]:
            offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
            ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
            if min((*offsets, *sizes), default=0) < 0 or any(e > n for e, n in zip(ends, shape, strict=True)):
                raise ValueError(f"a slice of {fqn} lies outside of it")
            if not _SHARD.fullmatch(chunk["file"]):
                raise ValueError(f"{chunk['file']!r} is no shard")
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            self._where[fqn, tuple(offsets)] = (chunk["file"], chunk["name"])
            volume += math.prod(sizes)
        if volume != math.prod(shape):
            raise ValueError(f"the slices of {fqn} do not make it up")
        self._metadata[fqn] = TensorStorageMetadata(TensorProperties(DTYPES[entry["dtype"]]), shape, chunks)

    def shapes(self, prefix: str) -> dict[str, Tensor]:
        """Tensors on the meta device, with global shape and dtype, by their names without the prefix."""
        return {
            fqn.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for fqn, entry in self._metadata.items()
            if fqn.startswith(prefix)
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Fill tensors in place; of a DTensor, this rank's part.

        Raises:
            CheckpointError: A tensor is not in the checkpoint, or has another shape there.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(dict(state), Metadata(dict(self._metadata)), is_coordinator=True)
            plan = planner.create_local_plan()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.folder} does not fit this model: {error}") from error
        for item in plan.items:
            source = item.storage_index
            file, name = self._where[source.fqn, tuple(source.offset or ())]
            if file not in self._files:
                self._files[file] = TensorFile(self.folder / file)
            region = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            part = self._files[file].read(name, region)
            if part.shape != target.shape:
                raise CheckpointError(f"{self.folder / file} is damaged: {name} has another shape than the index says")
            target.copy_(part)

    def close(self) -> None:
        """Release the mapped files."""
        self._files.clear()
