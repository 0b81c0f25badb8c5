"""What a config takes from the environment is used, and written neither in the run folder nor in the report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from mhf_lightning.parsing import SuggestingParser, environment_references, put_references

ROOT = Path(__file__).parents[2]


def parse(config: str) -> tuple[dict, dict]:
    """Resolve a config with sections ``a`` and ``b``; return it, and as it would be written."""
    parser = SuggestingParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_argument("--a", type=dict)
    parser.add_argument("--b", type=list)
    parser.add_argument("--n", type=int)
    with environment_references() as references:
        found: Namespace = parser.parse_args([f"--config={config}"])
    resolved = {key: value for key, value in found.as_dict().items() if key != "config"}
    return resolved, put_references(resolved, references)


def test_what_depends_on_the_environment_stays_as_it_was_written(monkeypatch):
    monkeypatch.setenv("CANARY", "7")
    config = {
        "a": {
            "key": "${oc.env:CANARY}",
            "header": "Bearer ${oc.env:CANARY}",
            "again": "${a.key}",
            "all": "${b}",
            "default": "${oc.env:NOT_THERE,3}",
            "other": "${a.plain}",
            "plain": 5,
        },
        "b": [1, {"deep": "${oc.env:CANARY}"}],
        "n": "${oc.env:CANARY}",
    }
    resolved, written = parse(yaml.safe_dump(config))
    assert resolved["n"] == 7
    assert resolved["a"]["header"] == "Bearer 7"
    assert written == {**config, "a": {**config["a"], "other": 5}}
    assert resolved["a"]["key"] == "7"  # a copy was changed


def test_without_the_environment_all_is_resolved():
    resolved, written = parse(yaml.safe_dump({"a": {"x": 1, "y": "${a.x}"}}))
    assert written is not resolved
    assert written == resolved == {"a": {"x": 1, "y": 1}, "b": None, "n": None}


CONFIG = """\
trainer:
  max_steps: ${oc.env:STEPS}
  val_check_interval: ${.max_steps}
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args:
      save_dir: ${oc.env:LOGS}
      name: ${oc.env:CANARY}
      sub_dir: "Authorization: Bearer canary2"
data:
  path: ${oc.env:CORPUS}
sample_prompt: ${oc.env:CANARY}
"""


@pytest.mark.slow
def test_a_run_and_its_report_keep_the_secret(corpus, tmp_path):
    """A run resumes and validates from its own config.yaml; only the logger's folder is named after the canary."""
    run, report = tmp_path / "run", tmp_path / "report.html"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEPS": "2", "LOGS": str(tmp_path / "logs")}
    environment |= {"CANARY": "canary1", "CORPUS": str(corpus)}

    def mhf(*args: str) -> str:
        command = [sys.executable, "-m", "mhf_lightning.cli", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    (tmp_path / "config.yaml").write_text(CONFIG)
    small = [
        *("--config", str(ROOT / "configs/model/flash_mhf.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml")),
        *("--model.decoder.vocab_size=300", "--model.decoder.d_model=32", "--model.decoder.num_layers=1"),
        *("--model.decoder.ffn.d_e=16", "--data.micro_batch_size=2", "--trainer.limit_val_batches=1"),
        "--model.schedule.warmup_steps=1",
    ]
    printed = mhf("fit", *small, "--config", str(tmp_path / "config.yaml"), "--run_dir", str(run))
    assert "trainer.logger.init_args.sub_dir: not written to" in printed
    environment["STEPS"] = "3"
    mhf("fit", "--config", str(run / "config.yaml"), "--ckpt_path", "auto")
    assert "val_loss" in mhf("validate", "--config", str(run / "config.yaml"), "--ckpt_path", "last").replace("/", "_")
    mhf("generate", str(run), "--prompt", "def", "--max_new_tokens", "1")  # finds the corpus
    mhf("report", str(run), "-o", str(report))
    written = yaml.safe_load((run / "config-resume-1.yaml").read_text())
    assert written["trainer"]["max_steps"] == "${oc.env:STEPS}"
    assert written["trainer"]["val_check_interval"] == "${.max_steps}"
    assert written["trainer"]["logger"]["init_args"]["sub_dir"] == "(redacted)"
    assert written["data"]["path"] == "${oc.env:CORPUS}"
    for path in (report, *(path for path in run.rglob("*") if path.is_file())):
        assert b"canary" not in path.read_bytes(), path
