import errno
import json
import os
import sysconfig
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mhf_lightning.data.errors import DataError
from mhf_lightning.data.sources import BadDocuments, read_documents, resolve_inputs


def read(*inputs, text_key="text", skip_bad=0, warnings=None):
    bad = BadDocuments(skip_bad, (warnings if warnings is not None else []).append)
    return list(read_documents(resolve_inputs(str(item) for item in inputs), text_key, bad))


def texts_of(*inputs, **options):
    return [document.text for document in read(*inputs, **options)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """One document of each kind, with a folder, a hidden file and a file of another kind."""
    root = tmp_path / "corpus"
    (root / "sub" / ".hidden").mkdir(parents=True)
    (root / "a.txt").write_bytes(b"one\r\ntwo \xc3\xa9")
    (root / "b.jsonl").write_text('{"text": "b1"}\n\n{"text": "b2", "id": 7}\n')
    (root / "sub" / "c.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "c1"}\n{"text": "c2"}'))
    pq.write_table(pa.table({"text": ["d1", "d2"], "n": [1, 2]}), root / "sub" / "d.parquet")
    (root / "sub" / "e.py").write_text("print(5)\n")
    (root / "sub" / ".hidden" / "f.txt").write_text("hidden")
    return root


def test_folder_is_read_in_sorted_order_with_origins(folder):
    documents = read(folder)
    assert [document.text for document in documents] == ["one\r\ntwo é", "b1", "b2", "c1", "c2", "d1", "d2"]
    assert [document.origin for document in documents[1:3]] == [f"{folder}/b.jsonl:1", f"{folder}/b.jsonl:3"]
    assert documents[-1].origin == f"{folder}/sub/d.parquet:row 1"


def test_globs_and_explicit_files(folder):
    assert texts_of(f"{folder}/**/*.py") == ["print(5)\n"]
    assert texts_of(f"{folder}/sub/e.py") == ["print(5)\n"]
    assert texts_of(f"{folder}/*.jsonl", f"{folder}/a.txt") == ["b1", "b2", "one\r\ntwo é"]
    assert texts_of(f"{folder}/**") == texts_of(folder / "a.txt", folder / "b.jsonl", folder / "sub/c.jsonl.zst",
                                                folder / "sub/d.parquet", folder / "sub/e.py")  # fmt: skip


def test_a_glob_reads_a_file_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.txt").write_text("once")
    assert texts_of(str(tmp_path / "**/**/*.txt")) == ["once"]


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("corpus/inner", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "corpus/inner/a.txt").write_text("a")
    (tmp_path / "elsewhere/b.txt").write_text("b")
    (tmp_path / "corpus/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/inner/around").symlink_to(tmp_path / "corpus")
    assert texts_of(str(tmp_path / "corpus")) == ["a", "b"]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("private"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="private cannot be read: Permission denied"):
        resolve_inputs([str(tmp_path)])


def test_other_compressions_are_refused_and_a_dataset_needs_a_name(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"compressed in a way that is not read here: .*\.jsonl\.zst"):
        resolve_inputs([str(tmp_path / "a.jsonl.gz")])
    with pytest.raises(DataError, match="hf:// names no dataset"):
        resolve_inputs(["hf://"])


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("odd name")
    assert texts_of(tmp_path / "a[1].txt") == ["odd name"]


def test_byte_order_marks_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
    assert texts_of(tmp_path) == ["text", "line"]


def test_python_stdlib():
    sources = resolve_inputs(["python-stdlib"])
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [Path(source.location).relative_to(root) for source in sources]
    assert len(names) > 400
    assert Path("argparse.py") in names
    assert Path("json/decoder.py") in names
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
    assert not [name for name in names if skipped & set(name.parts)]


def test_text_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    pq.write_table(pa.table({"content": pa.array(["y", "y"]).dictionary_encode()}), tmp_path / "b.parquet")
    assert texts_of(tmp_path, text_key="content") == ["x", "y", "y"]


def test_zst_of_several_frames_and_long_lines(tmp_path):
    long = "z" * 3_000_000
    frames = zstandard.compress(json.dumps({"text": long}).encode()) + zstandard.compress(b'\n{"text": "next"}\n')
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert texts_of(tmp_path) == [long, "next"]


def test_hub_local_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"body": "t1"}\n{"body": "t2"}\n')
    (tmp_path / "hub" / "test.jsonl").write_text('{"body": "v1"}\n')
    assert texts_of(f"hf://{tmp_path}/hub", text_key="body") == ["t1", "t2"]
    assert texts_of(f"hf://{tmp_path}/hub@default:test", text_key="body") == ["v1"]
    with pytest.raises(DataError, match=r"no column 'text'; columns there: 'body'.*--text_key"):
        read(f"hf://{tmp_path}/hub:train")
    with pytest.raises(DataError, match=r"cannot load hf://.*:nope: .*nope"):
        read(f"hf://{tmp_path}/hub:nope", text_key="body")
    datasets.Dataset.from_dict({"text": ["s1"]}).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(f"hf://{tmp_path}/saved") == texts_of(f"hf://{tmp_path}/saved:train") == ["s1"]
    with pytest.raises(DataError, match="the folder holds one split only, 'train'"):
        read(f"hf://{tmp_path}/saved:test")
    splits = {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in (("train", "s2"), ("test", "s3"))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    assert texts_of(f"hf://{tmp_path}/splits") == ["s2"]
    assert texts_of(f"hf://{tmp_path}/splits:test") == ["s3"]
    with pytest.raises(DataError, match="no split 'dev'; there are 'train', 'test'"):
        read(f"hf://{tmp_path}/splits:dev")


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.txt' does not exist.*Give a file, a folder"):
        resolve_inputs([str(tmp_path / "nowhere.txt")])
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        resolve_inputs(["a text, not its file " * 30])


def test_glob_without_a_match(tmp_path):
    with pytest.raises(DataError, match=r"\*\*/\*\.md' matches no file"):
        resolve_inputs([f"{tmp_path}/**/*.md"])


def test_folder_without_a_corpus(folder):
    for name in ("a.txt", "b.jsonl"):
        (folder / name).unlink()
    (folder / "sub" / "c.jsonl.zst").unlink()
    (folder / "sub" / "d.parquet").unlink()
    with pytest.raises(DataError, match=r"empty corpus: the folder .*corpus holds no file.*give a glob"):
        resolve_inputs([str(folder)])


def test_no_input():
    with pytest.raises(DataError, match="no input given"):
        resolve_inputs([])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', r"bad.jsonl:2: malformed JSON line \(Expecting.*one JSON object on each"),
        ("[1]", r"bad.jsonl:2: the line is a JSON list, not an object"),
        ('{"body": "a", "id": 1}', r"bad.jsonl:2: no key 'text'; keys there: 'body', 'id'.*--text_key"),
        ('{"text": 5}', r"bad.jsonl:2: 'text' is int, not a text"),
        ('{"text": "a\\ud800b"}', r"bad.jsonl:2: 'text' holds half a surrogate pair at character 1"),
        ("[" * 100_000, r"bad.jsonl:2: malformed JSON line"),
        (f'{{"text": "a", "id": {"9" * 5000}}}', r"bad.jsonl:2: malformed JSON line"),
    ],
)
def test_bad_jsonl_line(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "first"}}\n{line}\n{{"text": "third"}}\n')
    with pytest.raises(DataError, match=problem) as error:
        read(path)
    assert "--skip_bad" in str(error.value)
    warnings = []
    assert texts_of(path, skip_bad=1, warnings=warnings) == ["first", "third"]
    assert len(warnings) == 1
    assert "bad.jsonl:2" in warnings[0]


def test_skip_bad_allows_n_and_not_more(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{\n{"text": "good"}\nnull\n{"x": 1}\n')
    warnings = []
    assert texts_of(path, skip_bad=3, warnings=warnings) == ["good"]
    assert [":1: " in warnings[0], ":3: " in warnings[1], ":4: " in warnings[2]] == [True] * 3
    with pytest.raises(DataError, match=r"bad.jsonl:4: .*2 bad documents were skipped before it"):
        read(path, skip_bad=2)


def test_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8 text, byte 0xe9 at offset 3.*iconv"):
        read(tmp_path / "latin.txt")
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"lines.jsonl:2: not UTF-8 text, byte 0xff at offset 25"):
        read(tmp_path / "lines.jsonl")
    assert texts_of(tmp_path, skip_bad=2) == ["ok"]


@pytest.mark.parametrize("keep", [40, -1])
def test_truncated_zst(tmp_path, keep):
    whole = zstandard.compress(b"".join(b'{"text": "%d"}\n' % (number**9) for number in range(500)))
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(whole[:keep])
    with pytest.raises(DataError, match=r"cut.jsonl.zst: damaged zstandard file: .*truncated"):
        read(path, skip_bad=9)


def test_zst_that_is_none(tmp_path):
    (tmp_path / "plain.jsonl.zst").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"plain.jsonl.zst: damaged zstandard file.*again"):
        read(tmp_path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(number**9) for number in range(5000)], "n": range(5000)}), path)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"a.parquet: no column 'body'; columns there: 'text', 'n'.*--text_key"):
        read(path, text_key="body")
    with pytest.raises(DataError, match=r"a.parquet: column 'n' holds int64, not text"):
        read(path, text_key="n")
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"a.parquet: damaged parquet file"):
        read(path, skip_bad=9)
    path.write_bytes(whole[:1000] + bytes(4000) + whole[5000:])
    with pytest.raises(DataError, match=r"a.parquet: damaged parquet file"):
        read(path, skip_bad=9)


def test_bad_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    invalid = pa.array([b"good", b"b\xffd", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), path)
    with pytest.raises(DataError, match=r"a.parquet:row 1: not UTF-8"):
        read(path)
    with pytest.raises(DataError, match=r"a.parquet:row 2: 'text' is null"):
        read(path, skip_bad=1)
    assert texts_of(path, skip_bad=2) == ["good"]
