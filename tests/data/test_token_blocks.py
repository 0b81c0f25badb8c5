import pickle
import random

import datasets
import numpy as np
import pytest
import torch
from data_corpus import CONTEXT_LENGTH
from torch.utils.data import DataLoader

from mhf_lightning.data.blocks import IGNORE_INDEX, PaddedBlocks, TokenBlocks
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import Manifest
from mhf_lightning.data.sampler import GlobalOrderSampler


@pytest.fixture(scope="module")
def rows(prepared):
    shards = Manifest.load(prepared).splits["train"].shards
    return [row for shard in shards for row in datasets.Dataset.from_file(str(prepared / shard.file))]


def test_items(prepared, rows):
    blocks = TokenBlocks(prepared, "train")
    assert len(blocks) == len(rows)
    for index in (0, 19, 20, len(rows) - 1):  # across a border of shards
        item = blocks[index]
        assert set(item) == {"input_ids", "labels", "sample_index"}
        assert all(value.dtype == torch.int64 for value in item.values())
        targets = rows[index]["num_tokens"] - 1
        assert item["input_ids"].tolist() == rows[index]["tokens"][:-1]
        assert item["labels"][:targets].tolist() == rows[index]["tokens"][1 : targets + 1]
        assert item["labels"][targets:].eq(IGNORE_INDEX).all()
        assert item["sample_index"].item() == index
    assert rows[-1]["num_tokens"] < CONTEXT_LENGTH + 1  # or the padding above was not tested


def test_labels_count_each_token_but_the_first(prepared):
    for split in ("train", "validation"):
        blocks = TokenBlocks(prepared, split)
        labels = torch.stack([blocks[index]["labels"] for index in range(len(blocks))])
        assert labels.ne(IGNORE_INDEX).sum() == blocks.manifest.splits[split].tokens - 1


def test_batches_equal_items(prepared):
    blocks = TokenBlocks(prepared, "train", document_masking=True)
    indices = random.Random(0).sample(range(len(blocks)), 30)
    for item, index in zip(blocks.__getitems__(indices), indices, strict=True):
        for name, value in blocks[index].items():
            assert torch.equal(item[name], value)


def test_document_masking(prepared):
    plain, masked = TokenBlocks(prepared, "train"), TokenBlocks(prepared, "train", document_masking=True)
    eos = plain.manifest.eos_id
    borders = 0
    for index in range(len(plain)):
        before, after = plain[index], masked[index]
        assert torch.equal(before["input_ids"], after["input_ids"])
        document, position, labels = 0, 0, []
        for step, token in enumerate(before["input_ids"].tolist()):
            assert after["document_ids"][step] == document
            assert after["position_ids"][step] == position
            labels.append(IGNORE_INDEX if token == eos else before["labels"][step].item())
            position += 1
            if token == eos:
                document, position = document + 1, 0
                borders += before["labels"][step].item() != IGNORE_INDEX
        assert after["labels"].tolist() == labels
        assert after["position_ids"].dtype == after["document_ids"].dtype == torch.int64
    # All documents but the last end at a border inside the stream, and each is masked once.
    assert borders == plain.manifest.splits["train"].documents - 1


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_give_the_same_batches(prepared, context):
    blocks = TokenBlocks(prepared, "train", document_masking=True)

    def batches(workers):
        sampler = GlobalOrderSampler(len(blocks), 80, seed=3, micro_batch_size=4)
        return list(DataLoader(blocks, batch_sampler=sampler, num_workers=workers,
                               multiprocessing_context=context if workers else None))  # fmt: skip

    for alone, helped in zip(batches(0), batches(2), strict=True):
        assert alone["input_ids"].shape == (4, CONTEXT_LENGTH)
        for name in alone:
            assert torch.equal(alone[name], helped[name])


def test_pickle_holds_no_tokens(prepared):
    blocks = TokenBlocks(prepared, "train")
    data = pickle.dumps(blocks)
    assert len(data) < 20_000 < sum(shard.bytes for shard in blocks.manifest.splits["train"].shards)
    assert torch.equal(pickle.loads(data)[7]["input_ids"], blocks[7]["input_ids"])


def test_padding(prepared):
    blocks = TokenBlocks(prepared, "validation", document_masking=True)
    padded = PaddedBlocks(blocks, len(blocks) + 5)
    assert len(padded) == len(blocks) + 5
    batch = padded.__getitems__([len(blocks) - 1, len(blocks), len(blocks) + 1])
    assert torch.equal(batch[0]["labels"], blocks[len(blocks) - 1]["labels"])
    for item in (*batch[1:], padded[len(blocks) + 4], *padded.__getitems__([len(blocks)])):
        assert item["labels"].eq(IGNORE_INDEX).all()
        assert item["sample_index"] == -1
        assert {name: (value.shape, value.dtype) for name, value in item.items()} == {
            name: (value.shape, value.dtype) for name, value in blocks[0].items()
        }


def test_index_out_of_range(prepared):
    blocks = TokenBlocks(prepared, "train")
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_unknown_split(prepared):
    with pytest.raises(DataError, match="split is 'valid'; it must be one of train, validation"):
        TokenBlocks(prepared, "valid")


def test_damaged_shards_are_named(dataset):
    path = dataset / "train-00001.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    for verify_hashes in (True, False):
        with pytest.raises(DataError, match=r"train-00001.arrow is truncated"):
            TokenBlocks(dataset, "train", verify_hashes=verify_hashes)
    path.write_bytes(bytes(100) + whole[100:])
    with pytest.raises(DataError, match=r"train-00001.arrow was edited or damaged: expected sha256"):
        TokenBlocks(dataset, "train")
    with pytest.raises(DataError, match=r"train-00001.arrow is not a readable Arrow file"):
        TokenBlocks(dataset, "train", verify_hashes=False)
    TokenBlocks(dataset, "validation")  # the other split is whole
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001.arrow is missing"):
        TokenBlocks(dataset, "train", verify_hashes=False)


def test_a_token_beyond_the_vocabulary_names_its_shard(dataset):
    path = dataset / "train-00001.arrow"
    whole = bytearray(path.read_bytes())
    block = np.array(datasets.Dataset.from_file(str(path))[3]["tokens"], np.uint16).tobytes()
    position = whole.index(block)
    whole[position : position + 2] = (60_000).to_bytes(2, "little")
    path.unlink()  # the old file stays mapped above
    path.write_bytes(whole)
    blocks = TokenBlocks(dataset, "train", verify_hashes=False)
    with pytest.raises(DataError, match=r"train-00001.arrow was edited.*token id 60000 in block 23, .* 400"):
        blocks.__getitems__([0, 23, 5])
    with pytest.raises(DataError, match=r"train-00001.arrow was edited"):
        next(iter(DataLoader(blocks, batch_sampler=[[23]], num_workers=1)))
