"""The commands and the Python of the READMEs of hf and evaluation run as they stand, one after the other."""

import email
import re
import shlex
from pathlib import Path

import pytest
import yaml
from forked import mhf
from made_run import CONTEXT, build, make_corpus, make_run

PACKAGE = Path(__file__).parents[2] / "mhf_lightning"
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a run in runs/mine."""
    (tmp_path / "runs").mkdir()
    make_run(tmp_path / "runs/mine", build(), make_corpus(tmp_path / "data/mine"))
    return tmp_path


def commands(readme: str) -> list[list[str]]:
    (block,) = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert all(words[0] == "mhf" for words in lines)
    return [words[1:] for words in lines]


def test_hf(folder, monkeypatch, capsys):
    readme = (PACKAGE / "hf/README.md").read_text()
    for words in commands(readme):
        if words[:2] == ["data", "prepare"]:  # of the standard library, one package
            words[2] = str(Path(email.__file__).parent / "*.py")
            words += ["--context_length", "64"]
        if words[0] == "fit":  # a run of two steps
            words += ["--trainer.max_steps", "2", "--model.schedule.warmup_steps", "1", "--trainer.accelerator", "cpu"]
        mhf(*words, folder=folder)
    assert (folder / "runs/more/config.yaml").exists()
    assert (folder / "out/mine.json").exists()
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(code, {})
    assert "def f(" in capsys.readouterr().out


def test_evaluation(folder):
    readme = (PACKAGE / "evaluation/README.md").read_text()
    (folder / "corpus").mkdir()
    (folder / "corpus/a.txt").write_text("import json\n" * 40)
    (folder / "tasks").mkdir()
    (folder / "tasks/q.jsonl").write_text('{"q": "x =", "c": [" 1", " y"], "a": 0}\n' * 3)
    task = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "tasks/q.jsonl"}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}"}
    (folder / "tasks/mine.yaml").write_text(yaml.safe_dump({**task, "doc_to_target": "a"}))
    listed = commands(readme)
    assert f"--stride {CONTEXT}" in readme
    for words in listed:
        printed = mhf(*words, folder=folder)
    assert printed.startswith("def f(")
    names = {path.name for path in (folder / "runs/mine/eval").iterdir()}
    assert names == {"held_out-step-7.json", "blocks-step-7.json", "mine-step-7.json"}
