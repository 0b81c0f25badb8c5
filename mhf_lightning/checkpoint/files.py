"""The files of a checkpoint: safetensors and JSON, on disk for good and hashed when a function here returns.

Imports torch and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """Something is wrong with a checkpoint; the message names the file and says what to do."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint, by its name in the folder."""

    name: str
    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file, hash what is written beside that, and return when it is on the disk.

    Raises:
        CheckpointError: The system refused; the message names the file.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("xb") as file, ThreadPoolExecutor(1) as beside:
            for chunk in chunks:
                hashed = beside.submit(digest.update, chunk)
                file.write(chunk)
                hashed.result()  # a chunk may be memory that the next one is put into
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror}") from error
    return FileEntry(path.name, size, digest.hexdigest())


def write_json(path: Path, value: Any) -> FileEntry:
    """Write a value as JSON."""
    return write_file(path, [json.dumps(value, indent=1).encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write tensors in the safetensors format, one at a time; from a GPU by way of memory for the largest of them."""
    return write_file(path, _safetensors(tensors))


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    # One piece of memory for all of a GPU's: the pages of a new one each time take longer than the copying.
    sizes = (tensor.numel() * tensor.element_size() for tensor in tensors.values() if not tensor.is_cpu)
    memory = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    for tensor in tensors.values():
        data = tensor.detach()
        if not data.is_cpu:
            data = memory[: data.numel() * data.element_size()].view(data.dtype).view(data.shape).copy_(data)
        yield data.contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Give a path to make a file or folder at, which gets its name when the block ends well, and is removed otherwise.

    Raises:
        ValueError: There is something of that name, or it cannot be written.
    """
    if target.exists():
        raise ValueError(f"{target} exists; move it away, or give another OUT")
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if target.exists():
            raise ValueError(f"{target} appeared meanwhile; nothing was written over")
        unfinished.rename(target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target} could not be written: {error}") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            with suppress(OSError):
                unfinished.unlink()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: It is missing, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON") from error


class TensorFile:
    """A safetensors file open for reading; it is mapped, so a slice costs no more than its own bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def names(self) -> list[str]:
        """The tensors in the file."""
        return list(self._file.keys())

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return a tensor, or a region of it."""
        try:
            return self._file.get_slice(name)[region] if region else self._file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from error


def fsync_folder(path: Path) -> None:
    """Make the entries of a folder durable: without it a new name can be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
