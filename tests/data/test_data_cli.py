import os
import subprocess
import sys

import datasets
import pytest
import yaml

from mhf_lightning.data.cli import build_parser, main
from mhf_lightning.data.manifest import Manifest
from mhf_lightning.data.tokenizer import load_tokenizer

SMALL = ["--context_length", "32", "--vocab_size", "300", "--validation_fraction", "0.2", "--num_workers", "1"]


def test_prepare_inspect_verify(corpus, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["prepare", str(corpus), "--out", out, *SMALL]) == 0
    assert f"ready: {out}" in capsys.readouterr().out
    assert main(["inspect", out, "--samples", "2"]) == 0
    shown = capsys.readouterr().out
    manifest = Manifest.load(out)
    for split in ("train", "validation"):
        assert f"{manifest.splits[split].tokens:,}" in shown
        assert f"{manifest.splits[split].text_bytes / manifest.splits[split].tokens:.3f}" in shown
    assert "train block 0" in shown
    assert f"train block {manifest.splits['train'].blocks // 2}" in shown
    first = datasets.Dataset.from_file(f"{out}/train-00000.arrow")[0]["tokens"]
    assert load_tokenizer(out).decode(first, skip_special_tokens=False).splitlines()[0][:60] in shown
    assert main(["verify", out]) == 0
    assert "3 files match" in capsys.readouterr().out


def test_a_folder_of_few_text_files(tmp_path, capsys):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(f"The file of {name}. " * 50)
    assert main(["prepare", str(tmp_path), "--out", str(tmp_path / "out"), "--vocab_size", "300"]) == 0
    assert f"no document fell to validation by its hash; the nearest goes there: {tmp_path}/" in capsys.readouterr().err
    assert [split.documents for split in Manifest.load(tmp_path / "out").splits.values()] == [2, 1]


def test_verify_exit_codes(dataset, tmp_path, capsys):
    path = dataset / "train-00000.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(dataset)]) == 1
    assert "train-00000.arrow is truncated" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert "no prepared dataset" in capsys.readouterr().err


def test_config_file_and_flags(corpus, tmp_path):
    config = tmp_path / "prepare.yaml"
    options = {"inputs": [str(corpus)], "out": str(tmp_path / "a"), "context_length": 16, "vocab_size": 300,
               "validation_fraction": 0.2, "num_workers": 1}  # fmt: skip
    config.write_text(yaml.safe_dump(options))
    assert main(["prepare", "--config", str(config)]) == 0
    assert Manifest.load(tmp_path / "a").context_length == 16
    assert main(["prepare", "--config", str(config), "--context_length", "24", "--out", str(tmp_path / "b")]) == 0
    assert Manifest.load(tmp_path / "b").context_length == 24


def test_dashes_are_underscores(corpus, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(corpus.read_text() + "{\n")
    arguments = ["prepare", str(path), f"--out={tmp_path / 'out-put'}", "--skip-bad=1", *SMALL]
    assert main(arguments) == 0
    assert Manifest.load(tmp_path / "out-put").bad_documents == 1


def test_an_unknown_option_names_the_nearest(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("vocab_siz: 300\n")
    for arguments in (["--vocab_siz", "300"], ["--config", str(tmp_path / "c.yaml")]):
        with pytest.raises(SystemExit, match="2"):
            main(["prepare", "x", "--out", str(tmp_path / "o"), "--context_length", "8", *arguments])
        assert "did you mean 'vocab_size'?" in capsys.readouterr().err


def test_errors_are_one_message_on_stderr(tmp_path):
    command = [sys.executable, "-m", "mhf_lightning.data.cli", "prepare"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    for arguments, problem in (
        ([str(tmp_path / "nope.txt")], "nope.txt' does not exist"),
        ([], "no input given"),
        (["hf://no-such-owner/no-such-dataset:train"], "cannot load hf://no-such-owner/no-such-dataset:train"),
    ):
        done = subprocess.run([*command, *arguments, "--out", tmp_path / "out"], env=environment, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 2
        assert problem in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "x", "--out", "y", "--contextlength", "3"])
    assert stop.value.code == 2
    assert "--contextlength" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["prepare", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--skip_bad", "--tokenizer", "default: 1024", "hf://NAME", "python-stdlib", "validation, chosen"):
        assert text in shown


def test_the_command_imports_neither_torch_nor_lightning():
    code = (
        "import sys, mhf_lightning.data, mhf_lightning.data.cli as cli; cli.build_parser(); "
        "sys.exit(bool({'torch', 'lightning', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
