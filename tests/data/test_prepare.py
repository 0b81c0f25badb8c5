import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_corpus import CONTEXT_LENGTH, write_jsonl
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mhf_lightning.data import prepare as module
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import SPLITS, Manifest, verify
from mhf_lightning.data.packing import BlockWriter, LengthCounter
from mhf_lightning.data.prepare import prepare
from mhf_lightning.data.tokenizer import EOS_TOKEN, load_tokenizer

OPTIONS = {"context_length": 32, "vocab_size": 300, "validation_fraction": 0.2, "num_workers": 1}


def stream_of(folder: Path, split: str) -> tuple[list[int], int]:
    """The token stream put together again from the blocks, and the number of targets in them."""
    manifest = Manifest.load(folder)
    stream, targets = [], 0
    for shard in manifest.splits[split].shards:
        rows = datasets.Dataset.from_file(str(folder / shard.file))
        assert len(rows) == shard.rows
        for row in rows:
            tokens, count = row["tokens"], row["num_tokens"]
            assert len(tokens) == manifest.context_length + 1
            assert set(tokens[count:]) <= {manifest.eos_id}
            assert not stream or stream[-1] == tokens[0]
            stream += tokens[1 if stream else 0 : count]
            targets += count - 1
    return stream, targets


def test_every_token_is_a_target_once_and_text_comes_back(prepared, texts):
    manifest = verify(prepared)
    tokenizer = load_tokenizer(prepared)
    seen = []
    for split in SPLITS:
        info = manifest.splits[split]
        stream, targets = stream_of(prepared, split)
        assert len(stream) == info.tokens
        assert targets == info.tokens - 1
        assert info.blocks == sum(shard.rows for shard in info.shards) == -(-targets // CONTEXT_LENGTH)
        assert len(info.shards) > 1
        assert all(shard.rows == 20 for shard in info.shards[:-1])
        assert max(stream) <= manifest.largest_token_id < manifest.vocab_size == 400
        ends = [position for position, token in enumerate(stream) if token == manifest.eos_id]
        assert ends[-1] == len(stream) - 1
        documents = [
            tokenizer.decode(stream[start:end])
            for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)
        ]
        assert info.documents == len(documents)
        assert info.text_bytes == sum(len(text.encode()) for text in documents)
        lengths = np.diff([-1, *ends])
        assert (info.lengths.min, info.lengths.max) == (lengths.min(), lengths.max())
        assert info.lengths.mean == pytest.approx(lengths.mean(), abs=1e-3)
        assert info.lengths.quantiles["50"] == np.quantile(lengths, 0.5, method="inverted_cdf")
        assert sum(info.lengths.histogram.values()) == info.documents
        assert documents == [text for text in texts if text in set(documents)]  # in the order of the corpus
        seen += documents
    assert sorted(seen) == sorted(texts)


def test_validation_fraction(prepared, texts):
    share = Manifest.load(prepared).splits["validation"].documents / len(texts)
    assert share == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(("fraction", "split"), [(0.001, "validation"), (0.999, "train")])
def test_of_few_documents_one_goes_to_each_side(tmp_path, texts, capsys, fraction, split):
    options = {**OPTIONS, "validation_fraction": fraction}
    few = {hashlib.blake2b(text.encode(), digest_size=16).digest(): text for text in texts[:5]}
    chosen = few[min(few) if split == "validation" else max(few)]
    copies = [*texts[:5], chosen]
    for name, order, workers in (("a", copies, 1), ("b", copies[::-1], 2)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", order)
        path.write_text(path.read_text() + "oops\n")
        manifest = prepare([str(path)], str(tmp_path / name), **{**options, "num_workers": workers}, skip_bad=1)
        printed = capsys.readouterr().err
        line = re.search(rf"no document fell to {split} by its hash; the nearest goes there: {path}:(\d)\n", printed)
        assert order[int(line[1]) - 1] == chosen
        assert printed.count("skipped bad document") == 1  # though this pass is done twice
        assert {key: value.documents for key, value in manifest.splits.items()} == {
            key: 2 if key == split else 4 for key in SPLITS
        }
        stream = load_tokenizer(tmp_path / name).decode(stream_of(tmp_path / name, split)[0])
        assert stream == chosen * 2
        assert prepare([str(path)], str(tmp_path / name), **options, skip_bad=1) == manifest  # already there
        capsys.readouterr()
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_what_is_validated_on_is_not_trained_on_though_an_input_holds_it(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts[:30])
    held_out = write_jsonl(tmp_path / "b.jsonl", texts[30:40])
    options = {"context_length": 32, "vocab_size": 300, "num_workers": 1, "validation_input": str(held_out)}
    (tmp_path / "link.jsonl").symlink_to(held_out)
    manifest = prepare([str(tmp_path / "*.jsonl")], str(tmp_path / "out"), **options)
    assert {split: manifest.splits[split].documents for split in SPLITS} == {"train": 30, "validation": 10}
    with pytest.raises(DataError, match="the --validation_input is all of the inputs"):
        prepare([str(held_out)], str(tmp_path / "none"), **options)


def test_an_input_of_its_own_is_the_validation_split(tmp_path, texts):
    train, held_out = (
        str(write_jsonl(tmp_path / f"{n}.jsonl", part)) for n, part in (("a", texts[:40]), ("b", texts[40:]))
    )
    options = {"context_length": 32, "vocab_size": 300, "num_workers": 1}
    manifest = prepare([train], str(tmp_path / "out"), validation_input=held_out, **options)
    sizes = {split: manifest.splits[split].text_bytes for split in SPLITS}
    assert sizes["train"] == sum(len(text.encode()) for text in texts[:40])
    assert sizes["validation"] == sum(len(text.encode()) for text in texts[40:])
    assert prepare([train], str(tmp_path / "out"), validation_input=held_out, **options) == manifest  # already there
    write_jsonl(Path(train), texts[:39])
    write_jsonl(Path(held_out), texts[39:])  # the same documents in the same order, one of them on the other side
    with pytest.raises(DataError, match="already holds another dataset"):
        prepare([train], str(tmp_path / "out"), validation_input=held_out, **options)
    with pytest.raises(DataError, match="or --validation_input, not both"):
        prepare([train], str(tmp_path / "no"), validation_input=held_out, validation_fraction=0.1, **options)


def test_copies_land_on_one_side(tmp_path, texts):
    prepare([str(write_jsonl(tmp_path / "a.jsonl", texts[:40] * 3))], str(tmp_path / "out"), **OPTIONS)
    sides = []
    for split in SPLITS:
        text = load_tokenizer(tmp_path / "out").decode(stream_of(tmp_path / "out", split)[0], skip_special_tokens=False)
        sides.append(set(text.split(EOS_TOKEN)) - {""})
    assert sides[0] | sides[1] == set(texts[:40])
    assert not sides[0] & sides[1]


def test_any_number_of_workers_gives_the_same_bytes(corpus, tmp_path):
    long = tmp_path / "long.txt"  # several pieces and batches
    long.write_text(corpus.read_text() * 12)
    for workers in (1, 3):
        prepare([str(corpus), str(long)], str(tmp_path / str(workers)), **{**OPTIONS, "num_workers": workers})
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert {"manifest.json", "tokenizer.json", "train-00000.arrow", "validation-00000.arrow"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "3").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


@pytest.mark.parametrize(("largest", "dtype"), [(65535, "uint16"), (65536, "uint32")])
def test_token_dtype_follows_the_vocabulary(tmp_path, largest, dtype):
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "z": largest}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"a z {'a ' * number}z" for number in range(40)])
    manifest = prepare(
        [str(corpus)],
        str(tmp_path / "out"),
        context_length=8,
        tokenizer=str(tmp_path / "tokenizer.json"),
        validation_fraction=0.3,
        num_workers=1,
    )
    assert manifest.token_dtype == dtype
    assert manifest.vocab_size == largest + 1
    assert manifest.largest_token_id == largest
    rows = datasets.Dataset.from_file(str(tmp_path / "out" / "train-00000.arrow"))
    assert rows.features["tokens"].feature.dtype == dtype
    assert rows.features["tokens"].length == 9
    assert max(stream_of(tmp_path / "out", "train")[0]) == largest


def test_text_that_spells_eos_is_one_document(tmp_path, texts):
    spoiled = [f"{text}{EOS_TOKEN}tail" for text in texts[:40]]
    manifest = prepare([str(write_jsonl(tmp_path / "a.jsonl", spoiled))], str(tmp_path / "out"), **OPTIONS)
    for split in SPLITS:
        assert stream_of(tmp_path / "out", split)[0].count(manifest.eos_id) == manifest.splits[split].documents


def test_empty_and_bad_documents_are_counted(tmp_path, texts, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [*texts[:40], "", ""])
    path.write_text(path.read_text() + "oops\n")
    manifest = prepare([str(path)], str(tmp_path / "out"), **OPTIONS, skip_bad=1)
    assert (manifest.empty_documents, manifest.bad_documents) == (2, 1)
    assert sum(manifest.splits[split].documents for split in SPLITS) == 40
    assert capsys.readouterr().err.count("a.jsonl:43") == 1  # one warning, though the corpus is read twice


def test_already_prepared(tmp_path, corpus, capsys):
    out = tmp_path / "out"
    first = prepare([str(corpus)], str(out), **OPTIONS)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    capsys.readouterr()
    moved = tmp_path / "elsewhere.jsonl"  # the same content, from another place
    moved.write_bytes(corpus.read_bytes())
    assert prepare([str(moved)], str(out), **{**OPTIONS, "num_workers": 2}) == first
    assert "already prepared" in capsys.readouterr().err
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.jsonl", "out"]

    (out / "train-00000.arrow").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"train-00000.arrow is truncated"):
        prepare([str(corpus)], str(out), **OPTIONS)


@pytest.mark.parametrize("change", ["context_length", "vocab_size", "validation_fraction", "corpus"])
def test_another_dataset_is_not_overwritten(dataset, corpus, texts, tmp_path, change):
    other = {"context_length": 65, "vocab_size": 401, "validation_fraction": 0.11}
    options = {"context_length": 64, "vocab_size": 400, "validation_fraction": 0.1, "num_workers": 1, "shard_rows": 20}
    source = write_jsonl(tmp_path / "b.jsonl", texts[1:]) if change == "corpus" else corpus
    before = {path: path.read_bytes() for path in dataset.iterdir()}
    with pytest.raises(DataError, match=r"already holds another dataset.*Nothing was written. Choose another --out"):
        prepare([str(source)], str(dataset), **{**options, **({change: other[change]} if change in other else {})})
    assert {path: path.read_bytes() for path in dataset.iterdir()} == before
    assert prepare([str(corpus)], str(dataset), **options) == Manifest.load(dataset)  # the unchanged call is recognised


def test_a_folder_that_cannot_be_made_is_found_before_the_work(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("mhf_lightning.data.prepare._first_pass", None)
    (tmp_path / "file").touch()
    for out in ("/proc/data", tmp_path / "file/data"):
        with pytest.raises(DataError, match=rf"^cannot write to {Path(out).parent}: .*\. Choose another --out\.$"):
            prepare([str(corpus)], str(out), **OPTIONS)
    with pytest.raises(TypeError, match="NoneType"):
        prepare([str(corpus)], str(tmp_path / "new/data"), **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_things_in_the_way(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("run", "file"):
        with pytest.raises(DataError, match=r"exists and is not a prepared dataset. Nothing was written"):
            prepare([str(corpus)], str(tmp_path / name), **OPTIONS)
    assert (tmp_path / "run" / "metrics.csv").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    prepare([str(corpus)], str(tmp_path / "empty"), **OPTIONS)
    verify(tmp_path / "empty")


def test_readable_by_others(tmp_path, corpus):
    before = os.umask(0o022)
    try:
        prepare([str(corpus)], str(tmp_path / "out"), **OPTIONS)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


# ---- nothing half-written ------------------------------------------------------------------------------------------


def test_a_failing_write_leaves_nothing(tmp_path, corpus, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BlockWriter, "close", full)
    with pytest.raises(DataError, match=r"No space left on device. .*deep was not written"):
        prepare([str(corpus)], str(tmp_path / "out" / "deep"), **OPTIONS)
    assert list((tmp_path / "out").iterdir()) == []


def test_documents_without_tokens_make_no_dataset(tmp_path, prepared):
    words = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    words.normalizer = normalizers.Strip()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_text(" \n")
    options = {"context_length": 8, "tokenizer": str(tmp_path / "tokenizer.json"), "num_workers": 1}
    with pytest.raises(DataError, match="the documents of validation have no tokens"):
        prepare([str(tmp_path / "a.txt")], str(tmp_path / "o"), validation_input=str(tmp_path / "b.txt"), **options)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_dataset(tmp_path, sent):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mhf_lightning.data.cli", "prepare", "python-stdlib", "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--vocab_size=257", "--num_workers=2"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while not (begun := list(tmp_path.glob(".out.preparing-*/*.arrow"))) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    assert begun
    process.send_signal(sent)
    message = process.communicate(timeout=30)[1]
    assert process.returncode in (128 + sent, -sent)  # a shell shows the same for both
    assert not out.exists()
    if sent != signal.SIGKILL:  # which nothing can clean up after
        assert list(tmp_path.iterdir()) == []
        assert "Traceback" not in message


def test_inputs_that_change_between_the_passes(tmp_path, texts, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts[:40])
    train = module.train_tokenizer

    def train_then_edit(*arguments):
        trained = train(*arguments)
        write_jsonl(path, texts[1:41])
        return trained

    monkeypatch.setattr(module, "train_tokenizer", train_then_edit)
    with pytest.raises(DataError, match="the inputs changed while they were read"):
        prepare([str(path)], str(tmp_path / "out"), **OPTIONS)
    assert list(tmp_path.iterdir()) == [path]


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"empty corpus: the inputs hold no text \(1 empty documents"):
        prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_one_side_without_documents(tmp_path):
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "empty.txt")]
    for name, text in zip(names, ("a single document " * 100, "a single document " * 100, ""), strict=True):
        Path(name).write_text(text)
    for inputs, options, problem in (
        (names[:1], OPTIONS, r"to (train|validation): there is one, .*Give more documents.* with --validation_input"),
        (names[:2], OPTIONS, r"to (train|validation): there are 2, all of the same text, .*--validation_input"),
        (names[:1], {"validation_input": names[2], "vocab_size": 300}, r"to validation: the --validation_input holds"),
        (names[2:], {"validation_input": names[0], "vocab_size": 300}, r"to train: the other inputs hold no text"),
    ):
        with pytest.raises(DataError, match=f"no document fell {problem}"):
            prepare(inputs, str(tmp_path / "out"), **options)
        assert not (tmp_path / "out").exists()


def test_bad_line_through_workers(tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(DataError, match=rf"a.jsonl:{len(texts) + 1}: malformed"):
        prepare([str(path)], str(tmp_path / "out"), **{**OPTIONS, "num_workers": 2})
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_a_worker_is_the_same_error(tmp_path, texts):
    words = Tokenizer(models.WordLevel({"end": 0, "x": 1}, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    path = write_jsonl(tmp_path / "a.jsonl", [*texts[:40], "the end here"])
    with pytest.raises(DataError, match=r"turns text into its EOS token 'end'.*'the end here'"):
        prepare(
            [str(path)],
            str(tmp_path / "out"),
            tokenizer=str(tmp_path / "tokenizer.json"),
            eos_token="end",
            validation_fraction=0.3,
            num_workers=2,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ({"context_length": 0}, "context_length is 0; it must be at least 1"),
        ({"skip_bad": -1}, "skip_bad is -1"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"vocab_size": 100}, "vocab_size is 100; it must be at least 257"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 257"),
        ({"tokenizer": "t.json"}, "not both"),
    ],
)
def test_bad_options(corpus, tmp_path, option, problem):
    with pytest.raises(DataError, match=problem):
        prepare([str(corpus)], str(tmp_path / "out"), **{**OPTIONS, **option})
    assert list(tmp_path.iterdir()) == []


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_length_statistics_of_long_documents():
    lengths = np.random.default_rng(0).lognormal(8, 2, 20_000).astype(int) + 1
    counter = LengthCounter()
    for length in lengths.tolist():
        counter.add(length)
    stats = counter.stats()
    assert (stats.min, stats.max) == (lengths.min(), lengths.max())
    for percent, value in stats.quantiles.items():
        assert value == pytest.approx(np.quantile(lengths, int(percent) / 100, method="inverted_cdf"), rel=2e-3)
    expected = np.bincount(np.log2(lengths).astype(int))
    assert stats.histogram == {str(1 << bit): count for bit, count in enumerate(expected.tolist()) if count}
    assert json.dumps(stats.quantiles)


def test_no_quantile_lies_below_the_shortest_document():
    counter = LengthCounter()
    counter.add(5001)
    stats = counter.stats()
    assert set(stats.quantiles.values()) == {5001}
