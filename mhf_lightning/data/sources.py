"""Where documents come from: files, folders, globs, Hugging Face datasets and the standard library's sources.

`resolve_inputs` turns what the user typed into a list of sources without opening any of them; `read_documents` reads
them in that order, one document in memory at a time.
"""

from __future__ import annotations

import glob
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhf_lightning.data.errors import DataError

STDLIB = "python-stdlib"
HUB_PREFIX = "hf://"
SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One document: its text, and where it was read (a file, `file:line`, or `file:row N`)."""

    text: str
    origin: str


@dataclass(frozen=True)
class Source:
    """One file or Hub dataset; `kind` is text, jsonl, jsonl.zst, parquet or hub."""

    kind: str
    location: str


class BadDocuments:
    """Counts the bad documents of one reading; the one after `limit` is an error, those before it are warnings."""

    def __init__(self, limit: int, warn: Callable[[str], None]) -> None:
        self.limit = limit
        self.count = 0
        self._warn = warn

    def reject(self, problem: str, remedy: str) -> None:
        """Skip a document because of `problem`, or raise DataError when `limit` of them were skipped already."""
        self.count += 1
        if self.count > self.limit:
            skipped = f" ({self.limit} bad documents were skipped before it.)" if self.limit else ""
            raise DataError(f"{problem}. {remedy}, or skip up to N bad documents with --skip_bad N.{skipped}")
        self._warn(f"skipped bad document {self.count} of at most {self.limit}: {problem}")


def resolve_inputs(inputs: Iterable[str]) -> list[Source]:
    """Expand paths, folders, globs, `hf://` names and `python-stdlib` into sources, in the order given.

    Args:
        inputs: Files, folders (walked recursively, sorted, hidden entries left out, the suffixes of `SUFFIXES`), globs
            (`**` too; a matched file with another suffix is one plain-text document), `hf://NAME[@CONFIG][:SPLIT]`, or
            `python-stdlib`.

    Raises:
        DataError: An input does not exist, or a folder or glob holds nothing to read.
    """
    sources = [source for item in inputs for source in _resolve(item)]
    if not sources:
        raise DataError(f"no input given. Name files, folders, globs, {HUB_PREFIX}NAME or {STDLIB}.")
    return sources


def _resolve(item: str) -> list[Source]:
    if item == STDLIB:
        return _stdlib_sources()
    if item == HUB_PREFIX:
        raise DataError(f"{HUB_PREFIX} names no dataset: give {HUB_PREFIX}NAME[@CONFIG][:SPLIT].")
    if item.startswith(HUB_PREFIX):
        return [Source("hub", item)]
    path = Path(item).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        pass  # a glob, perhaps
    except OSError as error:  # a text that was meant as one
        raise DataError(
            f"the input {item[:60]!r} cannot be read: {error.strerror}. Give a file or a folder."
        ) from error
    if path.is_dir():
        files = [file for file in _walk(path, skip=set()) if file.name.lower().endswith(SUFFIXES)]
        if not files:
            raise DataError(
                f"empty corpus: the folder {item} holds no file that ends in {', '.join(SUFFIXES)}. "
                f"For files with another suffix give a glob, such as '{item.rstrip('/')}/**/*.md'."
            )
        return [_file_source(file) for file in files]
    if path.exists():
        return [_file_source(path)]
    if glob.has_magic(item):
        matches = sorted({Path(match) for match in glob.glob(os.path.expanduser(item), recursive=True)})
        files = [match for match in matches if match.is_file()]
        if not files:
            raise DataError(
                f"the glob {item!r} matches no file (searched from {Path.cwd()}). Check the pattern; '**' goes through "
                "any number of folders."
            )
        return [_file_source(file) for file in files]
    raise DataError(
        f"the input {item!r} does not exist (looked in {Path.cwd()}). Give a file, a folder, a glob, "
        f"{HUB_PREFIX}NAME[:split] for a Hugging Face dataset, or {STDLIB}."
    )


def _walk(folder: Path, skip: set[str]) -> list[Path]:
    """All files under a folder in sorted order, without hidden ones and without the folders named in `skip`.

    Links are followed, but to no folder twice.

    Raises:
        DataError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}.") from error

    def is_new(path: Path) -> bool:
        real = path.resolve()
        return not (real in seen or seen.add(real))  # type: ignore[func-returns-value]

    files: list[Path] = []
    seen = {folder.resolve()}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        folders[:] = [name for name in folders if is_new(Path(parent, name))]
        files.extend(Path(parent, name) for name in sorted(names) if not name.startswith("."))
    return files


def _file_source(path: Path) -> Source:
    name = path.name.lower()
    if name.endswith((".gz", ".bz2", ".xz", ".zip")):
        raise DataError(f"{path} is compressed in a way that is not read here: decompress it, or give a .jsonl.zst.")
    for kind in ("jsonl", "jsonl.zst", "parquet"):
        if name.endswith(f".{kind}"):
            return Source(kind, str(path))
    return Source("text", str(path))


def _stdlib_sources() -> list[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(root, _STDLIB_SKIP) if file.suffix == ".py"]
    if not files:
        raise DataError(
            f"{STDLIB}: this Python has no .py sources in {root}. Use an interpreter with its standard library on "
            "disk, or give a corpus of your own."
        )
    return [Source("text", str(file)) for file in files]


def read_documents(sources: Iterable[Source], text_key: str, bad: BadDocuments) -> Iterator[Document]:
    """Yield the documents of all sources in order.

    Args:
        sources: From `resolve_inputs`.
        text_key: The key (jsonl) or column (parquet, Hub) that holds the text.
        bad: Decides whether a bad document is skipped. Damage to a whole file (zst, parquet) is never skipped, since
            nobody knows how many documents are lost with it.

    Raises:
        DataError: Names the file, and the line, row or byte offset where there is one.
    """
    readers: dict[str, Callable[[Source, str, BadDocuments], Iterator[Document]]] = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "jsonl.zst": _read_jsonl,
        "parquet": _read_parquet,
        "hub": _read_hub,
    }
    for source in sources:
        try:
            yield from readers[source.kind](source, text_key, bad)
        except OSError as error:
            raise DataError(f"cannot read {source.location}: {error.strerror or error}") from error


def _decode(data: bytes, origin: str, offset: int, bad: BadDocuments) -> str | None:
    """UTF-8 text, or None where the document was rejected; `offset` is the position of `data` in its file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad.reject(
            f"{origin}: not UTF-8 text, byte 0x{data[error.start]:02x} at offset {offset + error.start} of the file",
            "Convert the file (iconv -f ENCODING -t UTF-8)",
        )
        return None


def _read_text(source: Source, text_key: str, bad: BadDocuments) -> Iterator[Document]:
    data = Path(source.location).read_bytes()
    start = len(_BOM) if data.startswith(_BOM) else 0
    text = _decode(data[start:], source.location, start, bad)
    if text is not None:
        yield Document(text, source.location)


def _read_jsonl(source: Source, text_key: str, bad: BadDocuments) -> Iterator[Document]:
    offset = 0
    with _open_lines(source) as lines:
        for number, line in enumerate(lines, start=1):
            start = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            origin = f"{source.location}:{number}"
            text = _decode(line[start:], origin, offset + start, bad)
            offset += len(line)
            if text is not None and not text.isspace() and text:
                document = _parse_line(text, origin, text_key, bad)
                if document is not None:
                    yield document


def _parse_line(line: str, origin: str, text_key: str, bad: BadDocuments) -> Document | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
        bad.reject(f"{origin}: malformed JSON line ({error})", "Correct the line: one JSON object on each")
        return None
    if not isinstance(row, dict):
        bad.reject(
            f"{origin}: the line is a JSON {type(row).__name__}, not an object",
            'Write objects, such as {"text": "..."}',
        )
        return None
    if text_key not in row:
        keys = ", ".join(map(repr, row)) or "none"
        bad.reject(f"{origin}: no key {text_key!r}; keys there: {keys}", "Name the right one with --text_key")
        return None
    return _checked(row[text_key], origin, text_key, bad)


def _checked(text: Any, origin: str, text_key: str, bad: BadDocuments) -> Document | None:
    """A document, unless the value is not a text that UTF-8 can hold (JSON may spell half a surrogate pair)."""
    if not isinstance(text, str):
        bad.reject(f"{origin}: {text_key!r} is {type(text).__name__}, not a text", "Name a text with --text_key")
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad.reject(
            f"{origin}: {text_key!r} holds half a surrogate pair at character {error.start}", "Correct the escape there"
        )
        return None
    return Document(text, origin)


def _open_lines(source: Source) -> io.BufferedIOBase:
    file = open(source.location, "rb")  # noqa: SIM115 (the caller closes it, through the wrapper where there is one)
    return io.BufferedReader(_ZstStream(file, source.location), 1 << 20) if source.kind == "jsonl.zst" else file


class _ZstStream(io.RawIOBase):
    """Decompresses zstandard frames. zstandard's own reader takes a truncated file for a finished one."""

    def __init__(self, file: io.BufferedIOBase, name: str) -> None:
        import zstandard

        self._file, self._name = file, name
        # Window logs above 27 (zstd --long) need the limit raised.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._input = b""
        self._output = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(1 << 17)
                if not self._input:
                    if self._frame is not None:
                        raise self._damaged("it ends inside a frame (truncated)")
                    return 0
            self._decompress()
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> None:
        import zstandard

        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._output = self._frame.decompress(self._input)
        except zstandard.ZstdError as error:
            raise self._damaged(str(error)) from error
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None

    def _damaged(self, problem: str) -> DataError:
        return DataError(
            f"{self._name}: damaged zstandard file: {problem}. Copy or download it again; 'zstd -t FILE' tests it."
        )


def _read_parquet(source: Source, text_key: str, bad: BadDocuments) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "Copy or write it again."
    try:
        with pq.ParquetFile(source.location) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                raise _missing_column(source.location, text_key, schema.names)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for data in _as_bytes(batch.column(0), source.location, text_key).to_pylist():
                    origin = f"{source.location}:row {row}"
                    row += 1
                    if data is None:
                        bad.reject(f"{origin}: {text_key!r} is null", "Drop the row")
                    elif (text := _decode(data, origin, 0, bad)) is not None:
                        yield Document(text, origin)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise DataError(f"{source.location}: damaged parquet file ({error}). {remedy}") from error


def _as_bytes(column: Any, location: str, text_key: str) -> Any:
    """The column as bytes: parquet does not check that strings are UTF-8, so they are decoded row by row."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{location}: column {text_key!r} holds {kind}, not text. Name a text column with --text_key.")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


def _missing_column(location: str, text_key: str, columns: Iterable[str]) -> DataError:
    return DataError(
        f"{location}: no column {text_key!r}; columns there: {', '.join(map(repr, columns)) or 'none'}. "
        "Name the right one with --text_key."
    )


def _read_hub(source: Source, text_key: str, bad: BadDocuments) -> Iterator[Document]:
    dataset = _load_hub(source.location)
    if text_key not in dataset.column_names:
        raise _missing_column(source.location, text_key, dataset.column_names)
    for number, row in enumerate(dataset.select_columns([text_key])):
        document = _checked(row[text_key], f"{source.location}:row {number}", text_key, bad)
        if document is not None:
            yield document


def _load_hub(location: str) -> Any:
    """`hf://NAME[@CONFIG][:SPLIT]`, by name or local folder; SPLIT is "train" unless given.

    A folder of ``Dataset.save_to_disk`` is one split, and need not be named.
    """
    import datasets

    name, _, split = location[len(HUB_PREFIX) :].partition(":")
    name, _, config = name.partition("@")
    try:
        if Path(name, "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(name)
            if (split or "train") not in splits:
                raise ValueError(f"no split {split or 'train'!r}; there are {', '.join(map(repr, splits))}")
            return splits[split or "train"]
        if Path(name, "state.json").is_file():
            dataset = datasets.load_from_disk(name)
            if split and split != str(dataset.split or "train"):
                raise ValueError(f"the folder holds one split only, {str(dataset.split or 'train')!r}")
            return dataset
        return datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {location}: {error}. Write {HUB_PREFIX}NAME[@CONFIG][:SPLIT] with a dataset of the Hugging "
            "Face Hub or a local folder; without a network only what is in the local cache can be read."
        ) from error
