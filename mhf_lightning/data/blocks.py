"""Blocks of tokens as a map-style torch dataset over memory-mapped Arrow shards."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import SPLITS, Manifest, check_file

IGNORE_INDEX = -100  # the label that cross-entropy leaves out
PADDING_SAMPLE = -1  # sample_index of a block that is not in the dataset

Item = dict[str, torch.Tensor]


class TokenBlocks(Dataset[Item]):
    """One split of a prepared dataset.

    Item i is a dict of int64 tensors: `input_ids` [L]; `labels` [L], the token after each input, -100 where there is
    none (padding of the last block); `sample_index` [], which is i.

    With `document_masking`, tokens of one document know nothing of another: also `position_ids` [L], which restart at 0
    after each EOS, and `document_ids` [L], which count documents from 0 within the block, so that attention can be
    limited to equal ids. The label at an EOS, the first token of the next document, is then -100. A document that began
    in the block before continues from position 0.

    Args:
        folder: A prepared dataset.
        split: "train" or "validation".
        verify_hashes: Hash every shard of the split when it is opened; sizes are always compared.
        document_masking: See above.

    Raises:
        DataError: The folder is no prepared dataset, or a shard (named) is missing, truncated, edited or unreadable.
    """

    def __init__(
        self, folder: str | Path, split: str, verify_hashes: bool = True, document_masking: bool = False
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
        self.folder = Path(folder)
        self.manifest = Manifest.load(folder)
        self.document_masking = document_masking
        self._shards = self.manifest.splits[split].shards
        for shard in self._shards:
            check_file(self.folder, shard, hashed=verify_hashes)
        self._dataset = self._open()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Item]:
        """The items of a whole batch, which is how a DataLoader asks for them."""
        rows = self._dataset[indices]
        tokens = rows["tokens"]  # [len(indices), L + 1]
        if tokens.max() >= self.manifest.vocab_size:
            raise self._damaged(indices[int(tokens.max(axis=1).argmax())], int(tokens.max()))
        inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
        labels[np.arange(labels.shape[1]) >= rows["num_tokens"][:, None] - 1] = IGNORE_INDEX
        batch = {"input_ids": inputs, "labels": labels, "sample_index": np.array(indices, np.int64)}
        if self.document_masking:
            is_end = inputs == self.manifest.eos_id
            labels[is_end] = IGNORE_INDEX
            batch["document_ids"] = is_end.cumsum(axis=1) - is_end
            batch["position_ids"] = _positions(is_end)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
        return [{name: values[row] for name, values in tensors.items()} for row in range(len(indices))]

    def padding_item(self) -> Item:
        """A block with no targets, to fill the last validation batch of a rank; its sample_index is -1."""
        item = {name: values.clone() for name, values in self[0].items()}
        item["input_ids"].fill_(self.manifest.eos_id)
        item["labels"].fill_(IGNORE_INDEX)
        item["sample_index"].fill_(PADDING_SAMPLE)
        if self.document_masking:
            item["position_ids"].zero_()
            item["document_ids"].copy_(torch.arange(self.manifest.context_length))
        return item

    def _open(self) -> Any:
        """Map the shards into memory."""
        import datasets
        import pyarrow as pa

        shards = []
        for shard in self._shards:
            path = self.folder / shard.file
            try:
                shards.append(datasets.Dataset.from_file(str(path)))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path} is not a readable Arrow file ({error}). Prepare the dataset again.") from error
        return datasets.concatenate_datasets(shards).with_format("numpy", dtype=np.int64)

    def _damaged(self, index: int, token: int) -> DataError:
        """An edited shard, when no hash was compared; on the device it would be an index out of range."""
        ends = list(accumulate(shard.rows for shard in self._shards))
        path = self.folder / self._shards[bisect_right(ends, index)].file
        return DataError(
            f"{path} was edited or damaged: token id {token} in block {index}, the vocabulary has "
            f"{self.manifest.vocab_size}. Run 'mhf data verify {self.folder}'."
        )


class PaddedBlocks(Dataset[Item]):
    """A dataset made longer: indices from `len(blocks)` to `length` are blocks without targets."""

    def __init__(self, blocks: TokenBlocks, length: int) -> None:
        self.blocks, self._length = blocks, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        return self.blocks[index] if index < len(self.blocks) else self.blocks.padding_item()

    def __getitems__(self, indices: list[int]) -> list[Item]:
        """The items of a whole batch, whose padding comes last."""
        present = [index for index in indices if index < len(self.blocks)]
        real = self.blocks.__getitems__(present) if present else []
        return real + [self.blocks.padding_item() for _ in range(len(indices) - len(real))]


def _positions(is_end: np.ndarray) -> np.ndarray:
    """Positions [n, L] that restart at 0 after each end of a document, from its mask [n, L]."""
    steps = np.arange(is_end.shape[1])
    starts = np.zeros_like(is_end, dtype=np.int64)
    starts[:, 1:] = np.where(is_end[:, :-1], steps[1:], 0)
    return steps - np.maximum.accumulate(starts, axis=1)
