"""The corpus: which files, which side, no copies, the same bytes each time, and an error on another machine."""

import json
import shutil

import pytest
from tiny_packages import CONTEXT_LENGTH

from mhf_lightning.cli import main
from mhf_lightning.data import DataError, Manifest, load_tokenizer
from mhf_lightning.evidence.corpus import File, find_files, look_at, make_corpus, without_duplicates


def kept(packages) -> list[str]:
    files = [file for file in map(look_at, find_files([packages])) if file is not None]
    files.sort(key=lambda file: (file.split == "train", file.name))
    return [file.name for file in without_duplicates(files)]


def test_files_that_hold_sources_stay_once(packages):
    names = kept(packages)
    assert not {"first/empty.py", "first/latin.py", "first/large.py", "first/notes.txt"} & set(names)
    assert {"first/message.py", "second/handlers.py", "single.py", "second/original.py"} <= set(names)
    assert "second/spaced.py" not in names  # the same lines
    assert "third/edited.py" not in names  # nearly the same lines
    assert "third/decoder_of_json.py" not in names  # a copy of what is validated on: the training side's goes
    assert "lightning/decoder.py" in names


def test_packages_are_split_whole(packages, corpus):
    record = json.loads((corpus / "corpus.json").read_text())
    assert record["validation"]["packages"].keys() == {"lightning"}
    assert record["train"]["packages"].keys() == {"first", "second", "single"}
    manifest = Manifest.load(corpus / "data")
    assert manifest.splits["validation"].documents == sum(record["validation"]["packages"].values())
    assert manifest.splits["train"].documents == sum(record["train"]["packages"].values()) == len(kept(packages)) - 5
    assert manifest.context_length == CONTEXT_LENGTH


def test_similar_files_are_told_from_different_ones(tmp_path):
    """Of 100 lines each, 95 in common: 95 / 105 of the lines of both; 75 in common: 75 / 125, below the border."""
    lines = [f"line_{i} = {i * i}" for i in range(200)]

    def look(name: str, start: int) -> File:
        (tmp_path / name).write_text("\n".join(lines[start : start + 100]))
        return look_at((name, tmp_path / name))

    whole, near, far = look("whole.py", 0), look("near.py", 5), look("far.py", 25)
    assert (whole.minima == near.minima).mean() == pytest.approx(95 / 105, abs=0.08)
    assert (whole.minima == far.minima).mean() == pytest.approx(75 / 125, abs=0.12)
    assert [file.name for file in without_duplicates([whole, near, far])] == ["whole.py", "far.py"]


def test_the_same_packages_give_the_same_dataset_anywhere(packages, corpus, tmp_path):
    other = shutil.copytree(packages, tmp_path / "elsewhere")
    manifest = make_corpus(
        tmp_path / "new/data", corpus / "tokenizer.json", corpus / "corpus.json", [other], CONTEXT_LENGTH
    )
    assert manifest.dataset_id == Manifest.load(corpus / "data").dataset_id
    # With the record at hand a dataset that is there is not made again.
    assert make_corpus(tmp_path / "new/data", corpus / "tokenizer.json", corpus / "corpus.json", [], 1) == manifest


def test_another_corpus_is_refused_by_what_differs(packages, corpus, tmp_path):
    other = shutil.copytree(packages, tmp_path / "elsewhere")
    (other / "second/handlers.py").unlink()
    with pytest.raises(DataError, match=r"second \(train\): 4 files recorded, 3 here.*--record"):
        make_corpus(tmp_path / "data", corpus / "tokenizer.json", corpus / "corpus.json", [other], CONTEXT_LENGTH)


def test_the_tokenizer_decodes_what_it_encodes(packages, corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    text = (packages / "single.py").read_text()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_without_packages_of_both_sides_there_is_no_corpus(packages, corpus, tmp_path):
    shutil.copytree(packages / "second", tmp_path / "packages/second")
    with pytest.raises(DataError, match="no validation package"):
        make_corpus(tmp_path / "data", corpus / "tokenizer.json", tmp_path / "new.json", [tmp_path / "packages"])


def test_the_command_takes_what_is_there(corpus, capfd):
    options = {"--data": "data", "--tokenizer": "tokenizer.json", "--record": "corpus.json"}
    with pytest.raises(SystemExit) as end:
        main(["evidence", "corpus", *(part for key, name in options.items() for part in (key, str(corpus / name)))])
    assert end.value.code == 0
    assert "already prepared" in capfd.readouterr().err
