"""The manifest of a prepared dataset: what it holds, with the size and hash of every file; load, save, verify."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhf_lightning.data.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class FileEntry:
    """A file of the dataset, relative to its folder; `rows` are blocks, 0 for the tokenizer."""

    file: str
    bytes: int
    sha256: str
    rows: int = 0

    @classmethod
    def of(cls, path: Path, rows: int = 0) -> FileEntry:
        """The entry of a file as it is on disk."""
        return cls(path.name, path.stat().st_size, sha256_of(path), rows)


@dataclass(frozen=True)
class LengthStats:
    """Lengths of documents in tokens, with EOS.

    `quantiles` maps a percentage to a length (exact below 1,024 tokens, within 0.2% above); `histogram` maps the lower
    edge of each power-of-two bin to a number of documents.
    """

    min: int
    mean: float
    max: int
    quantiles: dict[str, int]
    histogram: dict[str, int]


@dataclass(frozen=True)
class SplitInfo:
    """One side of the dataset. `tokens` counts one EOS a document and no padding; `text_bytes` is UTF-8 text."""

    documents: int
    tokens: int
    text_bytes: int
    blocks: int
    lengths: LengthStats
    shards: list[FileEntry]


@dataclass(frozen=True)
class Manifest:
    """What a prepared dataset holds.

    `fingerprint` recognises the call that made it: options and the content of the inputs, wherever they lay.
    `vocab_size` is the tokenizer's largest id plus one, `largest_token_id` the largest one that occurs in the data.
    """

    format_version: int
    context_length: int
    vocab_size: int
    eos_id: int
    eos_token: str
    largest_token_id: int
    token_dtype: str
    fingerprint: str
    inputs: list[str]
    empty_documents: int
    bad_documents: int
    tokenizer: FileEntry
    splits: dict[str, SplitInfo]

    @property
    def dataset_id(self) -> str:
        """Identifies the blocks themselves, for a run that continues on this dataset or a copy of it."""
        parts = [shard.sha256 for name in SPLITS for shard in self.splits[name].shards]
        return hashlib.sha256(json.dumps([self.context_length, parts]).encode()).hexdigest()

    def files(self) -> list[FileEntry]:
        """The tokenizer and every shard."""
        return [self.tokenizer, *(shard for name in SPLITS for shard in self.splits[name].shards)]

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a prepared dataset.

        Raises:
            DataError: No such folder, not a prepared dataset, or one of another format version.
        """
        path = Path(folder) / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "has no manifest.json" if Path(folder).is_dir() else "does not exist"
            raise DataError(
                f"no prepared dataset: {folder} {what}. Make one with 'mhf data prepare INPUT --out {folder}'."
            ) from error
        except ValueError as error:  # not JSON, or not UTF-8
            raise DataError(f"{path} cannot be read ({error}). Prepare the dataset again.") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version!r}; only {FORMAT_VERSION} can be read. Prepare the dataset again."
            )
        try:
            return cls._parse(raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} was edited: {error}. Prepare the dataset again.") from error

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> Manifest:
        splits = {}
        for name in SPLITS:
            split = raw["splits"][name]
            shards = [FileEntry(**shard) for shard in split["shards"]]
            splits[name] = SplitInfo(**{**split, "lengths": LengthStats(**split["lengths"]), "shards": shards})
        return cls(**{**raw, "tokenizer": FileEntry(**raw["tokenizer"]), "splits": splits})


def sha256_of(path: Path) -> str:
    """Hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(folder: str | Path, entry: FileEntry, hashed: bool) -> None:
    """Compare a file with its entry: existence and size, and with `hashed` its sha256 too.

    Raises:
        DataError: Names the file and what differs.
    """
    path = Path(folder) / entry.file
    remedy = "Restore it from a copy, or prepare the dataset again."
    if not path.is_file():
        raise DataError(f"{path} is missing; manifest.json names it. {remedy}")
    size = path.stat().st_size
    if size != entry.bytes:
        how = "truncated" if size < entry.bytes else "longer than written"
        raise DataError(f"{path} is {how}: expected {entry.bytes} bytes, found {size}. {remedy}")
    if hashed and (found := sha256_of(path)) != entry.sha256:
        raise DataError(f"{path} was edited or damaged: expected sha256 {entry.sha256}, found {found}. {remedy}")


def verify(folder: str | Path, on_file: Callable[[FileEntry], None] | None = None) -> Manifest:
    """Hash every shard and the tokenizer again and compare with the manifest.

    Args:
        folder: A prepared dataset.
        on_file: Called with each file that was found good.

    Raises:
        DataError: Names the first bad file.
    """
    manifest = Manifest.load(folder)
    for entry in manifest.files():
        check_file(folder, entry, hashed=True)
        if on_file is not None:
            on_file(entry)
    return manifest
