"""Checkpoint folders: manifest, verification, atomic commit, pruning, and the newest valid one. No collectives here.

Imports ``files.py``. Where several processes save together, one of them calls these functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mhf_lightning.checkpoint.files import CheckpointError, FileEntry, fsync_folder, read_json, write_file, write_json
from mhf_lightning.cores import usable_cores
from mhf_lightning.data.manifest import sha256_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_COMMITTED = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: Optimiser steps done.
        kind: ``sharded`` (the format of this package) or ``deepspeed`` (DeepSpeed's own files).
        files: Every file of the folder but the manifest.
        about: For people: ranks, strategy, version of torch, tokens seen.
    """

    step: int
    kind: Literal["sharded", "deepspeed"]
    files: list[FileEntry]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the manifest, with a hash of itself, and sync it."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_json(folder / MANIFEST, {**content, "sha256": _hash_of(content)})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check the manifest itself, not the files it lists.

        Raises:
            CheckpointError: It is missing, damaged, or of another version of the format.
        """
        path = folder / MANIFEST
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("sha256", None) != _hash_of(content):
            raise CheckpointError(f"{path} is damaged: its hash does not match")
        if content.pop("format_version", None) != FORMAT_VERSION:
            raise CheckpointError(f"{path} has another format version than {FORMAT_VERSION}; use the release it is of")
        try:
            files = [FileEntry(**entry) for entry in content.pop("files")]
            return cls(files=files, **content)
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def _hash_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_verified: dict[Path, tuple[Any, ...]] = {}


def verify(folder: str | Path) -> Manifest:
    """Compare every file of a checkpoint with the manifest, by size and then by hash.

    Files that did not change since this process last hashed them are not hashed again.

    Returns:
        The manifest.

    Raises:
        CheckpointError: The message names the first file that is missing, cut, or altered.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no checkpoint folder")
    manifest = Manifest.load(folder)
    named = _COMMITTED.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{folder} holds step {manifest.step}: it was renamed")
    seen: list[Any] = []
    for entry in manifest.files:
        path = _inside(folder, entry.name)
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} is missing") from error
        if status.st_size != entry.bytes:
            raise CheckpointError(f"{path} is damaged: {status.st_size} bytes, {entry.bytes} were written")
        seen += [entry.sha256, status.st_ino, status.st_mtime_ns]
    if _verified.get(folder) != tuple(seen):
        with ThreadPoolExecutor(usable_cores()) as pool:
            hashes = pool.map(sha256_of, [folder / entry.name for entry in manifest.files])
            try:
                for entry, found in zip(manifest.files, hashes, strict=True):
                    if found != entry.sha256:
                        raise CheckpointError(f"{folder / entry.name} is damaged: its hash does not match")
            except OSError as error:
                raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
        _verified[folder] = tuple(seen)
    return manifest


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which is not in the folder")
    return folder / name


def temporary(path: Path) -> Path:
    """Where a checkpoint is written before it is committed to ``path``."""
    return path.with_name(path.name + ".tmp")


def begin(path: Path) -> Path:
    """Make the empty temporary folder of a checkpoint, in place of one that a killed process left.

    Raises:
        CheckpointError: ``path`` exists; nothing is overwritten. Or the system refused.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists already; move it away to save there")
    folder = temporary(path)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be made: {error.strerror}") from error
    return folder


def commit(path: Path, manifest: Manifest) -> None:
    """Turn the temporary folder of a checkpoint, whose files are synced, into the checkpoint ``path``."""
    folder = temporary(path)
    try:
        for entry in manifest.files:
            found = (folder / entry.name).stat().st_size  # also says that this process sees what the others wrote
            if found != entry.bytes:
                raise CheckpointError(f"{folder / entry.name}: {found} bytes are there, {entry.bytes} were written")
        manifest.save(folder)
        fsync_folder(folder)
        folder.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be committed: {error}") from error


def abandon(path: Path) -> None:
    """Remove what a failed save left, to free the disk."""
    shutil.rmtree(temporary(path), ignore_errors=True)


def point_latest(path: Path) -> None:
    """Let ``latest`` name this checkpoint, atomically."""
    new = path.with_name(LATEST + ".tmp")
    new.unlink(missing_ok=True)
    write_file(new, [path.name.encode() + b"\n"])
    new.replace(path.with_name(LATEST))
    fsync_folder(path.parent)


def _content(folder: Path) -> list[Path]:
    """What lies in a folder; where it does not exist, nothing.

    Raises:
        CheckpointError: It cannot be read: there may be checkpoints.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError as error:
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a link to {folder.readlink()}, which is not there") from error
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The committed checkpoints of a folder by step, the newest first.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    found = {int(name[1]): path for path in _content(Path(folder)) if (name := _COMMITTED.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def prune(folder: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and those of steps divisible by ``keep_every``.

    No save may be running: unfinished folders go too, among them what an earlier call could not remove.
    """
    for step, path in list(checkpoints(folder).items())[keep_last:]:
        if not (keep_every and step % keep_every == 0):
            path.rename(temporary(path))  # never half a checkpoint under the name of a whole one
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove temporary folders; a warning names those that stay, as NFS keeps a file that another process reads."""
    for leftover in (path for path in _content(folder) if path.match("step-*.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)
        if leftover.exists():
            warnings.warn(f"{leftover} could not be removed; the next save tries again", stacklevel=2)


def prepare_run(folder: Path, step: int) -> list[Path]:
    """Make a folder ready for a run that starts at ``step``.

    Unfinished folders are removed. Checkpoints of later steps belong to a past that the run does not continue; they
    get the suffix ``.set-aside``, so that none of them is ever taken for the newest of this run.

    Returns:
        What was set aside, under its new name.
    """
    aside = []
    remove_unfinished(folder)
    known = checkpoints(folder)
    if step in known:
        point_latest(known[step])
    for path in (known[later] for later in known if later > step):
        new, number = path.with_name(f"{path.name}.set-aside"), 1
        while new.exists():
            number += 1
            new = path.with_name(f"{path.name}.set-aside-{number}")
        path.rename(new)
        aside.append(new)
    return aside


def newest(folder: str | Path) -> Path:
    """Return the newest committed checkpoint, verified.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    path = next(iter(found.values()))
    try:
        verify(path)
    except CheckpointError as error:
        raise CheckpointError(f"the newest checkpoint cannot be used: {error}") from error
    return path


def find_newest_valid(folder: str | Path, verify_files: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a message for each newer one that does not.

    Args:
        folder: Of the checkpoints.
        verify_files: Compare the files with the manifest; else only read the manifest.

    Returns:
        ``(path, messages)``; the path is None where there is no trace of a checkpoint.

    Raises:
        CheckpointError: There are checkpoints, or were, and none can be used.
    """
    folder = Path(folder)
    messages: list[str] = []
    for path in checkpoints(folder).values():
        try:
            if verify_files:
                verify(path)
            else:
                Manifest.load(path)
            return path, messages
        except CheckpointError as error:
            messages.append(str(error))
    traces = [path.name for path in _content(folder) if not path.name.endswith(".tmp")]
    if traces:
        reasons = "; ".join(messages) or f"it holds {', '.join(sorted(traces)[:5])}"
        raise CheckpointError(
            f"{folder}: no checkpoint can be used ({reasons}). Restore one, or start a new run in another folder"
        )
    return None, messages


def sync_and_list(folder: Path) -> list[FileEntry]:
    """Sync and hash all files below a folder, which others wrote."""
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries.append(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path)))
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    return entries
