"""Pack the token stream of one split into blocks of L + 1 tokens and write them as Arrow shards."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mhf_lightning.data.manifest import FileEntry, LengthStats, SplitInfo

_BATCH_BYTES = 4 << 20
_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
_EXACT_BITS = 10


class LengthCounter:
    """Counts document lengths in memory that does not grow with the corpus: 10 leading bits of each length are kept."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._total = 0
        self._min = 0
        self._max = 0

    def add(self, length: int) -> None:
        """Count one document of `length` tokens."""
        shift = max(0, length.bit_length() - _EXACT_BITS)
        self._counts[length >> shift << shift] += 1
        self._total += length
        self._min = min(self._min or length, length)
        self._max = max(self._max, length)

    def stats(self) -> LengthStats:
        """Statistics over the documents so far (at least one)."""
        lengths = sorted(self._counts)
        documents = sum(self._counts.values())
        below = np.cumsum([self._counts[length] for length in lengths])
        places = {percent: np.searchsorted(below, math.ceil(documents * percent / 100)) for percent in _QUANTILES}
        quantiles = {str(percent): max(self._min, lengths[int(place)]) for percent, place in places.items()}
        histogram: Counter[int] = Counter()
        for length in lengths:
            histogram[1 << (length.bit_length() - 1)] += self._counts[length]
        return LengthStats(
            min=self._min,
            mean=round(self._total / documents, 3),
            max=self._max,
            quantiles=quantiles,
            histogram={str(edge): histogram[edge] for edge in sorted(histogram)},
        )


class BlockWriter:
    """Cuts a stream S of tokens into blocks S[i*L : i*L + L + 1] and writes them to `SPLIT-NNNNN.arrow`.

    Neighbouring blocks share one token, so every token but the first is a target exactly once. The last block is padded
    with EOS; the column `num_tokens` says how many of its L + 1 tokens are from the stream.

    Shards are Arrow IPC streams, which `datasets.Dataset.from_file` maps into memory: `tokens`
    fixed_size_list<uint16 or uint32>[L + 1] and `num_tokens` int32.
    """

    def __init__(
        self, folder: Path, split: str, context_length: int, eos_id: int, dtype: np.dtype[Any], shard_rows: int
    ) -> None:
        self._folder, self._split, self._length = folder, split, context_length
        self._eos_id, self._dtype, self._shard_rows = eos_id, dtype, shard_rows
        width = context_length + 1
        self._schema = pa.schema(
            [
                pa.field("tokens", pa.list_(pa.from_numpy_dtype(dtype), width), nullable=False),
                pa.field("num_tokens", pa.int32(), nullable=False),
            ]
        )
        self._batch_rows = max(1, min(shard_rows, _BATCH_BYTES // (width * dtype.itemsize)))
        self._parts: list[np.ndarray] = []
        self._buffered = 0
        self._shards: list[FileEntry] = []
        self._rows = 0
        self._path = folder
        self._sink: Any = None
        self._writer: Any = None
        self._lengths = LengthCounter()
        self._documents = self._tokens = self._text_bytes = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document, EOS included."""
        self._documents += 1
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        self._lengths.add(len(tokens))
        self._parts.append(tokens.astype(self._dtype))
        self._buffered += len(tokens)
        if self._buffered > self._batch_rows * self._length:
            self._write_full_blocks()

    def close(self) -> SplitInfo:
        """Write what is left and finish the last shard."""
        self._write_full_blocks()
        rest = np.concatenate(self._parts) if self._parts else np.empty(0, self._dtype)
        if len(rest) > 1:  # one token is no block: it was a target already
            padded = np.full((1, self._length + 1), self._eos_id, self._dtype)
            padded[0, : len(rest)] = rest
            self._write(padded, np.array([len(rest)], np.int32))
        if self._writer is not None:
            self._finish_shard()
        return SplitInfo(
            documents=self._documents,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            blocks=sum(shard.rows for shard in self._shards),
            lengths=self._lengths.stats(),
            shards=self._shards,
        )

    def _write_full_blocks(self) -> None:
        count = (self._buffered - 1) // self._length
        if count < 1:
            return
        stream = np.concatenate(self._parts)
        blocks = np.lib.stride_tricks.sliding_window_view(stream, self._length + 1)[:: self._length]
        for start in range(0, count, self._batch_rows):
            rows = blocks[start : min(start + self._batch_rows, count)]
            self._write(rows, np.full(len(rows), self._length + 1, np.int32))
        self._parts = [stream[count * self._length :].copy()]
        self._buffered = len(self._parts[0])

    def _write(self, blocks: np.ndarray, num_tokens: np.ndarray) -> None:
        while len(blocks):
            if self._writer is None:
                self._start_shard()
            take = min(len(blocks), self._shard_rows - self._rows)
            flat = _to_arrow(np.ascontiguousarray(blocks[:take]).reshape(-1))
            columns = [pa.FixedSizeListArray.from_arrays(flat, self._length + 1), _to_arrow(num_tokens[:take])]
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
            self._rows += take
            if self._rows == self._shard_rows:
                self._finish_shard()
            blocks, num_tokens = blocks[take:], num_tokens[take:]

    def _start_shard(self) -> None:
        self._path = self._folder / f"{self._split}-{len(self._shards):05d}.arrow"
        self._sink = self._path.open("wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)
        self._rows = 0

    def _finish_shard(self) -> None:
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())  # the folder is renamed next: its files must not be empty after a crash
        self._sink.close()
        self._writer = None
        self._shards.append(FileEntry.of(self._path, self._rows))


def _to_arrow(values: np.ndarray) -> Any:
    """A NumPy vector as an Arrow array; `pa.array` would import pandas for it."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])
