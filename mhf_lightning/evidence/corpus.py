"""Real text that every machine with the project has: the Python sources of its installed packages, as a dataset.

A document is a file. Packages, the top-level names of the folders that Python installs into, are split by a hash of
their name, so that validation is code of packages that were never trained on; near-duplicates are removed, on the
training side where they lie on both.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sysconfig
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhf_lightning.cores import usable_cores
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import MANIFEST, SPLITS, Manifest
from mhf_lightning.data.prepare import prepare
from mhf_lightning.data.progress import say
from mhf_lightning.data.tokenizer import train_tokenizer

VALIDATION_FRACTION = 0.05  # of package names
MAX_BYTES = 1_000_000  # larger files are tables written by programs
VOCAB_SIZE = 16384
TOKENIZER_SAMPLE = 6  # the tokenizer is trained on every sixth training document

# MinHash: 128 hash functions in 32 bands of 4. Two files of which 80% of the lines are common share a band with
# probability 1 - (1 - 0.8^4)^32, and the share of equal minima tells their similarity to within 0.035.
HASHES, BANDS = 128, 32
SIMILAR = 0.8
_ODD, _ADD = np.random.default_rng(0).integers(0, 2**64, (2, HASHES), dtype=np.uint64)
_ODD |= np.uint64(1)


@dataclass(frozen=True)
class File:
    """A source file, looked at.

    Attributes:
        name: Relative to the folder that packages are installed into.
        path: Where it is.
        exact: Hash of its lines without indentation, blank lines and trailing space.
        minima: ``[HASHES]`` uint64, the MinHash signature of its set of lines.
    """

    name: str
    path: Path
    exact: bytes
    minima: np.ndarray

    @property
    def package(self) -> str:
        """The name that ``import`` takes."""
        return self.name.partition("/")[0].removesuffix(".py")

    @property
    def split(self) -> str:
        """The side on which its package lies."""
        digest = hashlib.sha256(self.package.encode()).digest()
        return "validation" if int.from_bytes(digest[:8], "big") < VALIDATION_FRACTION * 2**64 else "train"


def installed_folders() -> list[Path]:
    """Return the folders that Python's packages are installed into."""
    return sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})


def find_files(folders: list[Path]) -> list[tuple[str, Path]]:
    """Return name and path of all source files below the folders, sorted by name; of equal names the first folder's."""
    files: dict[str, Path] = {}
    for folder in folders:
        for path in folder.rglob("*.py"):
            files.setdefault(path.relative_to(folder).as_posix(), path)
    return sorted(files.items())


def look_at(file: tuple[str, Path]) -> File | None:
    """Hash a file's lines; None where it has no text, is not UTF-8, or is too large."""
    name, path = file
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if not lines or len(data) > MAX_BYTES:
        return None
    features = np.frombuffer(b"".join(_hash(line) for line in set(lines)), dtype="<u8")
    minima = np.full(HASHES, 2**64 - 1, dtype=np.uint64)
    for part in np.array_split(features, len(features) // 4096 + 1):
        minima = np.minimum(minima, (part[:, None] * _ODD + _ADD).min(0))  # modulo 2^64
    return File(name, path, _hash("\n".join(lines)), minima)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def without_duplicates(files: list[File]) -> list[File]:
    """Keep the files that are not near-duplicates of an earlier one."""
    kept: list[File] = []
    exact: set[bytes] = set()
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for file in files:
        if file.exact in exact:
            continue
        bands = [(i, band.tobytes()) for i, band in enumerate(np.split(file.minima, BANDS))]
        near = sorted({number for band in bands for number in buckets.get(band, ())})
        if near and (np.stack([kept[i].minima for i in near]) == file.minima).mean(1).max() >= SIMILAR:
            continue
        exact.add(file.exact)
        for band in bands:
            buckets.setdefault(band, []).append(len(kept))
        kept.append(file)
    return kept


def make_corpus(
    out: Path, tokenizer: Path, record: Path, folders: list[Path] | None = None, context_length: int = 1024
) -> Manifest:
    """Prepare the dataset, and compare it with the one that was recorded before.

    Args:
        out: Folder of the dataset, as ``mhf data prepare`` makes it.
        tokenizer: The tokenizer's file; where it does not exist, one is trained on a part of the corpus and written.
        record: A JSON file that says what the corpus is; written where it does not exist.
        folders: Folders that hold packages; those of this Python unless given.
        context_length: Tokens of a block.

    Raises:
        DataError: There is nothing to read, or the dataset is another one than the record's.
    """
    if record.exists() and (out / MANIFEST).exists():
        manifest = Manifest.load(out)
        if manifest.dataset_id == json.loads(record.read_text(encoding="utf-8"))["dataset_id"]:
            say(f"already prepared: {out}")
            return manifest
    folders = installed_folders() if folders is None else folders
    found = find_files(folders)
    with ProcessPoolExecutor(usable_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        looked = [file for file in pool.map(look_at, found, chunksize=64) if file is not None]
    # Validation first: of a pair with one file on each side, the training side's goes.
    looked.sort(key=lambda file: (file.split == "train", file.name))
    kept = without_duplicates(looked)
    say(f"{len(found):,} files: {len(looked):,} are sources, {len(kept):,} without near-duplicates")
    texts = {split: [f.path.read_text(encoding="utf-8") for f in kept if f.split == split] for split in SPLITS}
    for split in SPLITS:
        if not texts[split]:
            raise DataError(f"no {split} package below {', '.join(map(str, folders))}; install more packages")
    if not tokenizer.exists():
        say(f"training a tokenizer on every {TOKENIZER_SAMPLE}th training document")
        train_tokenizer(texts["train"][::TOKENIZER_SAMPLE], VOCAB_SIZE).save(str(tokenizer), pretty=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".evidence-") as folder:
        lines = {split: Path(folder, f"{split}.jsonl") for split in SPLITS}
        for split, path in lines.items():
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[split]), encoding="utf-8")
        manifest = prepare(
            [str(lines["train"])],
            str(out),
            context_length=context_length,
            tokenizer=str(tokenizer),
            validation_input=str(lines["validation"]),
        )
    compare(describe(manifest, kept), record)
    return manifest


def describe(manifest: Manifest, kept: list[File]) -> dict[str, object]:
    """Return what the record says: identity and counts of the dataset, and its packages with their number of files."""
    splits = {
        split: {
            "documents": manifest.splits[split].documents,
            "tokens": manifest.splits[split].tokens,
            "text_bytes": manifest.splits[split].text_bytes,
            "packages": dict(sorted(Counter(file.package for file in kept if file.split == split).items())),
        }
        for split in SPLITS
    }
    return {"dataset_id": manifest.dataset_id, "tokenizer_sha256": manifest.tokenizer.sha256, **splits}


def compare(found: dict[str, object], record: Path) -> None:
    """Write the record, or check that this is the same corpus.

    Raises:
        DataError: It is another one; the message names what differs.
    """
    if not record.exists():
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    recorded = json.loads(record.read_text(encoding="utf-8"))
    if recorded["dataset_id"] == found["dataset_id"]:
        return
    differences = [
        f"{name} ({split}): {there.get(name, 0)} files recorded, {here.get(name, 0)} here"
        for split in SPLITS
        for here, there in [(found[split]["packages"], recorded[split]["packages"])]  # type: ignore[index]
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if recorded["tokenizer_sha256"] != found["tokenizer_sha256"]:
        differences.insert(0, "another tokenizer")
    shown = "; ".join(differences[:8]) or "the same packages and numbers of files, with other text"
    raise DataError(
        f"the corpus of this machine is not that of {record}: {shown}. Runs on it do not compare with those made "
        "before: install the same packages, or begin anew with another --record and another --queue."
    )
