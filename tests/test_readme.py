"""The commands and the code of the README run, shortened only by flags that make them small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--model.schedule.warmup_steps", "1"]
SHORT += ["--trainer.accelerator", "cpu", "--trainer.num_sanity_val_steps", "1"]


def commands() -> list[list[str]]:
    """Every `mhf` command of the README, as a list of words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("mhf ")]


def run(words: list[str], folder: Path) -> None:
    if words[1] == "fit":
        words = [*words, *SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mhf_lightning.cli", *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
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
