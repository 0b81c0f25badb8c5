"""The commands and the code of the READMEs run, shortened only by flags that make them small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forked import mhf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--model.schedule.warmup_steps", "1"]
SHORT += ["--trainer.accelerator", "cpu", "--trainer.num_sanity_val_steps", "1"]


def commands(text: str = README) -> list[list[str]]:
    """Every `mhf` command of a README, as a list of words."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("mhf ")]


def run(words: list[str], folder: Path) -> None:
    if words[1] == "fit":
        words = [*words, *SHORT]
    if "--trainer.devices" not in words:
        mhf(*words[1:], folder=folder)
        return
    command = [sys.executable, "-m", "mhf_lightning.cli", *words[1:]]  # that Lightning starts again for each device
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_every_mhf_command_runs_in_order(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "corpus").mkdir()
    for number, path in enumerate(sorted((ROOT / "mhf_lightning").rglob("*.py"))):
        (tmp_path / "corpus" / f"{number}.txt").write_text(path.read_text())
    listed = commands()
    assert [words[1] for words in listed] == ["data", "fit", "data", "data", "data", "fit"]
    for words in listed:
        run(words, tmp_path)
    assert (tmp_path / "runs/mine/checkpoints/latest").exists()


# READMEs of folders whose commands run one after the other, and what they are.
FOLDERS = {
    "configs": ["fit"],
    "mhf_lightning/checkpoint": ["fit", "validate", "export"],
    "mhf_lightning/plan": ["plan"],
    "mhf_lightning/training": ["fit"],
}


@pytest.mark.slow
def test_the_commands_of_other_readmes_run(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"a few words of text number {number}\n" * 50)
    prepare = "mhf data prepare *.txt --out data/quickstart --context_length 64 --vocab_size 300"
    run([*shlex.split(prepare), "--validation_fraction", "0.2"], tmp_path)
    for folder, expected in FOLDERS.items():
        listed = commands((ROOT / folder / "README.md").read_text())
        assert [words[1] for words in listed] == expected
        for words in listed:
            run(words, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert len(list((tmp_path / "runs/two/checkpoints/step-2").glob("shard-*"))) == 2  # of two processes


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_path_that_another_readme_names_exists(folder):
    for path in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / folder / "README.md").read_text()):
        assert (ROOT / folder / path).exists(), path


def test_make_train_runs_the_commands_of_the_readme():
    printed = subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for words in commands()[:2]:
        assert shlex.join(words) in printed


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    assert scope["y"].shape == (2, 128, 512)


def test_every_path_that_the_readme_names_exists():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    folders = re.findall(r"^\| `([^`]+/)`", README, re.MULTILINE)
    assert links
    assert folders
    for path in links + folders:
        assert (ROOT / path).exists(), path
