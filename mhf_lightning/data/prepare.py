"""`mhf data prepare`: documents -> split -> tokens -> blocks in Arrow shards, a tokenizer and a manifest.

Two passes over the inputs, each with one document in memory at a time: the first hashes and counts, and trains the
tokenizer; the second encodes and writes. All is written to a temporary folder beside the output and renamed at the end.

Where the hashes send all documents to one split, which is for small corpora, the one whose hash comes nearest goes to
the other, and the first pass is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from mhf_lightning.cores import usable_cores
from mhf_lightning.data.encoding import encode_in_order
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import FORMAT_VERSION, MANIFEST, SPLITS, TOKENIZER, FileEntry, Manifest, check_file
from mhf_lightning.data.packing import BlockWriter
from mhf_lightning.data.progress import progress, say
from mhf_lightning.data.sources import BadDocuments, Document, Source, read_documents, resolve_inputs
from mhf_lightning.data.tokenizer import EOS_TOKEN, eos_id_of, load_tokenizer, train_tokenizer, vocab_size_of

T = TypeVar("T")

DEFAULT_VOCAB_SIZE = 16384
DEFAULT_VALIDATION_FRACTION = 0.05


@dataclass
class _Scan:
    """What the first pass found."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty: int = 0
    bad: int = 0
    content: str = ""
    smallest: tuple[bytes, str] | None = None  # hash and origin, among those whose split the text decides
    largest: tuple[bytes, str] | None = None


class _Corpus:
    """The inputs and how they are read: the same documents at each reading, or an error.

    With `held_out`, those sources are the validation split, and the others the training split.
    """

    def __init__(
        self, sources: list[Source], held_out: list[Source], text_key: str, skip_bad: int, validation_fraction: float
    ) -> None:
        self._sources, self._held_out, self._text_key, self._skip_bad = sources, held_out, text_key, skip_bad
        self._fraction = validation_fraction
        self._moved: dict[bytes, str] = {}

    def side(self, digest: bytes) -> str:
        """The split of a document: by its text alone, so that copies of it land on one side."""
        if digest in self._moved:
            return self._moved[digest]
        return "validation" if int.from_bytes(digest[:8], "big") < self._fraction * 2**64 else "train"

    def fill(self, scan: _Scan) -> bool:
        """Move a document to the split that has none, from the next reading on; False where that is not to be done.

        It is the one whose hash comes nearest to that split, with all copies of it, in whatever order they were read.
        """
        if scan.smallest is None or scan.largest is None or scan.smallest[0] == scan.largest[0]:
            return False
        for split, (digest, origin) in (("validation", scan.smallest), ("train", scan.largest)):
            if not scan.documents[split]:
                self._moved[digest] = split
                say(f"no document fell to {split} by its hash; the nearest goes there: {origin}")
                return True
        return False

    def _documents(self, bad: BadDocuments) -> Iterator[tuple[Document, str | None]]:
        """Yield (document, split); the split is None where the text decides."""
        side = "train" if self._held_out else None
        for document in read_documents(self._sources, self._text_key, bad):
            yield document, side
        for document in read_documents(self._held_out, self._text_key, bad):
            yield document, "validation"

    def read(self, scan: _Scan, quiet: bool) -> Iterator[tuple[str, str, int]]:
        """Yield (text, split, bytes of UTF-8), leaving out empty documents; fills `scan` as it goes."""
        bad = BadDocuments(self._skip_bad, (lambda message: None) if quiet else (lambda text: say(f"warning: {text}")))
        content = hashlib.sha256()
        for document, given in self._documents(bad):
            text = document.text
            if not text:
                scan.empty += 1
                continue
            data = text.encode("utf-8")
            digest = hashlib.blake2b(data, digest_size=16).digest()
            content.update(digest)
            if given is None:
                named = digest, document.origin
                scan.smallest, scan.largest = min(scan.smallest or named, named), max(scan.largest or named, named)
            split = given or self.side(digest)
            scan.documents[split] += 1
            yield text, split, len(data)
        scan.bad, scan.content = bad.count, content.hexdigest()


def prepare(
    inputs: list[str],
    out: str,
    context_length: int = 1024,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    eos_token: str = EOS_TOKEN,
    text_key: str = "text",
    validation_fraction: float | None = None,
    validation_input: str | None = None,
    skip_bad: int = 0,
    num_workers: int | None = None,
    shard_rows: int = 65536,
) -> Manifest:
    """Tokenise a corpus and pack it into blocks for training.

    The output depends on the inputs and options alone, not on num_workers. Where `out` already holds the result of the
    same call, nothing is done.

    Args:
        inputs: Files (.txt, .jsonl, .jsonl.zst, .parquet; others as plain text), folders, globs, hf://NAME[@CONFIG][:SPLIT]
            for a Hugging Face dataset, or python-stdlib for the sources of Python's standard library.
        out: Folder to make. It must not exist, be empty, or hold the result of the same call.
        context_length: L, the tokens a model sees at once; blocks hold L + 1.
        tokenizer: A tokenizer.json to use; without it a byte-level BPE is trained on the training documents.
        vocab_size: Size of the trained vocabulary, 257 or more (16384 unless given).
        eos_token: The token that ends each document.
        text_key: The key (jsonl) or column (parquet, Hugging Face) that holds the text.
        validation_fraction: Share of documents kept for validation, chosen by a hash of their text (0.05 unless given).
        validation_input: An input to validate on, of any kind that inputs may have; the others are all trained on then,
            and nobody looks for copies between the two.
        skip_bad: How many bad documents (malformed line, missing key, not UTF-8) may be skipped, each with a warning.
        num_workers: Tokenizer processes (one for each core unless given).
        shard_rows: Blocks in a file.

    Raises:
        DataError: The inputs, the options or the output folder are wrong; nothing was written.
    """
    if validation_fraction is not None and validation_input is not None:
        raise DataError("give --validation_fraction (a share of the inputs) or --validation_input, not both.")
    fraction = DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    _check_options(context_length, tokenizer, vocab_size, fraction, skip_bad, num_workers, shard_rows)
    sources = resolve_inputs(inputs)
    held_out = resolve_inputs([validation_input]) if validation_input is not None else []
    real = {_real(source) for source in held_out}
    sources = [source for source in sources if _real(source) not in real]
    if not sources:
        raise DataError("the --validation_input is all of the inputs: nothing is left to train on.")
    target = Path(out).expanduser().resolve()
    existing = _existing(target)
    if existing is None:
        _check_writable(target)
    given = load_tokenizer(tokenizer, eos_token) if tokenizer is not None else None
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    options = {
        "format_version": FORMAT_VERSION,
        "context_length": context_length,
        "eos_token": eos_token,
        "tokenizer": hashlib.sha256(given.to_str().encode()).hexdigest() if given else f"byte-level BPE {size}",
        "validation_fraction": fraction if validation_input is None else None,
        "shard_rows": shard_rows,
    }
    corpus = _Corpus(sources, held_out, text_key, skip_bad, fraction)
    used = given
    if given is not None or existing is not None:
        scan, _ = _first_pass(corpus, deque[str](maxlen=0).extend)
    else:
        scan, trained = _first_pass(corpus, lambda texts: train_tokenizer(texts, size, eos_token))
        used, reached = trained, vocab_size_of(trained)
        if reached < size:
            say(f"warning: the corpus is too small for {size} tokens: the vocabulary has {reached}.")
    if held_out:
        options["documents"] = scan.documents  # the hash of the content does not tell where the training split ends
    fingerprint = hashlib.sha256(json.dumps([options, scan.content], sort_keys=True).encode()).hexdigest()
    if existing is not None:
        if existing.fingerprint != fingerprint:
            raise DataError(
                f"{out} already holds another dataset (other inputs or options; made from "
                f"{', '.join(existing.inputs)} with context_length {existing.context_length}). "
                "Nothing was written. Choose another --out, or remove it."
            )
        for entry in existing.files():
            check_file(target, entry, hashed=False)
        say(f"already prepared: {out}")
        return existing
    assert used is not None
    vocab = vocab_size_of(used)
    token_dtype = np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)
    eos_id = eos_id_of(used, eos_token)
    with _appearing(target) as folder:
        writers = {
            split: BlockWriter(folder, split, context_length, eos_id, token_dtype, shard_rows) for split in SPLITS
        }
        largest = _second_pass(corpus, scan, used, eos_token, writers, num_workers or usable_cores())
        (folder / TOKENIZER).write_text(used.to_str(pretty=True), encoding="utf-8")
        splits = {split: writer.close() for split, writer in writers.items()}
        for split, info in splits.items():
            if not info.blocks:
                raise DataError(f"the documents of {split} have no tokens: the tokenizer drops their text.")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            context_length=context_length,
            vocab_size=vocab,
            eos_id=eos_id,
            eos_token=eos_token,
            largest_token_id=largest,
            token_dtype=token_dtype.name,
            fingerprint=fingerprint,
            inputs=[*inputs, *([] if validation_input is None else [validation_input])],
            empty_documents=scan.empty,
            bad_documents=scan.bad,
            tokenizer=FileEntry.of(folder / TOKENIZER),
            splits=splits,
        )
        manifest.save(folder)
    return manifest


def _real(source: Source) -> str:
    return source.location if source.kind == "hub" else os.path.realpath(source.location)


def _check_options(
    context_length: int,
    tokenizer: str | None,
    vocab_size: int | None,
    validation_fraction: float,
    skip_bad: int,
    num_workers: int | None,
    shard_rows: int,
) -> None:
    least = {"context_length": (context_length, 1), "skip_bad": (skip_bad, 0), "shard_rows": (shard_rows, 1)}
    least["num_workers"] = (1 if num_workers is None else num_workers, 1)
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise DataError(f"{name} is {value}; it must be at least {minimum}.")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1, without both.")
    if tokenizer is not None and vocab_size is not None:
        raise DataError("give --tokenizer (a file) or --vocab_size (to train one), not both.")


def _existing(target: Path) -> Manifest | None:
    """The manifest of a dataset that is already there; None where there is nothing to write over."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / MANIFEST).is_file():
        raise DataError(
            f"{target} exists and is not a prepared dataset. Nothing was written. Choose another --out, or remove it."
        )
    return Manifest.load(target)


def _first_pass(corpus: _Corpus, use: Callable[[Iterator[str]], T]) -> tuple[_Scan, T]:
    """Hash and count the documents; return that, and what `use` makes of the texts for training: it reads them all."""
    scan = _Scan()
    used = use(_training_texts(corpus, scan, again=False))
    if corpus.fill(scan):
        scan = _Scan()
        used = use(_training_texts(corpus, scan, again=True))
    total = sum(scan.documents.values())
    if not total:
        raise DataError(
            f"empty corpus: the inputs hold no text ({scan.empty} empty documents, {scan.bad} bad ones). "
            "Give files with text in them."
        )
    for split in SPLITS:
        if not scan.documents[split]:
            if scan.smallest is None:
                where = "the --validation_input holds" if split == "validation" else "the other inputs hold"
                raise DataError(f"no document fell to {split}: {where} no text. Give files with text in them.")
            found = "is one" if total == 1 else f"are {total}, all of the same text"
            raise DataError(
                f"no document fell to {split}: there {found}, and each goes to one side whole. Give more documents (a "
                ".jsonl with one a line, or several files), or another file with --validation_input."
            )
    return scan, used


def _training_texts(corpus: _Corpus, scan: _Scan, *, again: bool) -> Iterator[str]:
    """Yield the texts of the training documents; warnings are for the first reading."""
    with progress("reading again" if again else "reading") as advance:
        for text, split, size in corpus.read(scan, quiet=again):
            advance(1, size)
            if split == "train":
                yield text


def _second_pass(
    corpus: _Corpus,
    expected: _Scan,
    tokenizer: Tokenizer,
    eos_token: str,
    writers: dict[str, BlockWriter],
    num_workers: int,
) -> int:
    """Encode all documents into the writer of their split; return the largest token id."""
    scan = _Scan()
    largest = 0

    def documents() -> Iterator[tuple[str, tuple[str, int]]]:
        for text, split, size in corpus.read(scan, quiet=True):
            yield text, (split, size)

    with progress("tokenising", sum(expected.documents.values())) as advance:
        for (split, size), tokens in encode_in_order(documents(), tokenizer, eos_token, num_workers):
            writers[split].add(tokens, size)
            largest = max(largest, int(tokens.max()))
            advance(1, size)
    if scan.content != expected.content:
        raise DataError("the inputs changed while they were read. Start again when nothing writes to them.")
    return largest


def _check_writable(target: Path) -> None:
    """Find out before the work, and not after it, that the folder cannot be made; leaves nothing."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        folder = _hidden(target)
        folder.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot write to {target.parent}: {error.strerror}. Choose another --out.") from error
    with suppress(OSError):  # another process may use a parent by now
        for made in (folder, *missing):
            made.rmdir()


def _hidden(target: Path) -> Path:
    return target.parent / f".{target.name}.preparing-{secrets.token_hex(4)}"


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well, and not at all otherwise."""
    folder = _hidden(target)
    try:
        folder.mkdir(parents=True)
        yield folder
        try:
            folder.rename(target)  # replaces an empty folder and nothing else
        except OSError as error:
            raise DataError(f"{target} appeared meanwhile ({error.strerror}); nothing was written over.") from error
    except OSError as error:  # a full disk, or an input that can be read no more
        raise DataError(f"{error}. {target} was not written.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
