import json

import pytest

from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import MANIFEST, Manifest, verify


def test_round_trip(prepared, tmp_path):
    manifest = Manifest.load(prepared)
    manifest.save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == (prepared / MANIFEST).read_bytes()
    assert Manifest.load(tmp_path) == manifest


def test_verify_hashes_every_file(prepared):
    good = []
    verify(prepared, on_file=lambda entry: good.append(entry.file))
    assert sorted([*good, MANIFEST]) == sorted(path.name for path in prepared.iterdir())


@pytest.mark.parametrize("name", ["train-00001.arrow", "validation-00000.arrow", "tokenizer.json"])
def test_verify_names_the_bad_file(dataset, name):
    path = dataset / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=rf"{name} is truncated: expected {len(whole)} bytes, found {len(whole) - 7}"):
        verify(dataset)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=rf"{name} is longer than written"):
        verify(dataset)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DataError, match=rf"{name} was edited or damaged: expected sha256"):
        verify(dataset)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        verify(dataset)
    path.write_bytes(whole)
    verify(dataset)


def test_load_errors(dataset, tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist. Make one with 'mhf data prepare"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no manifest.json"):
        Manifest.load(tmp_path)
    path = dataset / MANIFEST
    raw = json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        Manifest.load(dataset)
    path.write_text(json.dumps({**raw, "format_version": 99}))
    with pytest.raises(DataError, match=r"format version 99; only 1 can be read"):
        Manifest.load(dataset)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"format version None"):
        Manifest.load(dataset)
    del raw["eos_id"]
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"manifest.json was edited: .*eos_id"):
        Manifest.load(dataset)


def test_dataset_id_is_of_the_blocks(dataset, prepared):
    raw = json.loads((dataset / MANIFEST).read_text())
    identity = Manifest.load(prepared).dataset_id
    (dataset / MANIFEST).write_text(json.dumps({**raw, "inputs": ["elsewhere"]}))
    assert Manifest.load(dataset).dataset_id == identity
    raw["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (dataset / MANIFEST).write_text(json.dumps(raw))
    assert Manifest.load(dataset).dataset_id != identity
