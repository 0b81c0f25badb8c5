"""How long a run is: passes over the data, the validation of its last weights, and the schedule of one made longer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import mhf

from mhf_lightning.data.manifest import Manifest
from mhf_lightning.data.prepare import prepare

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODEL = [
    *("--config", str(ROOT / "configs/model/flash_mhf.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml")),
    *("--model.decoder.vocab_size", "300", "--model.decoder.d_model", "64", "--model.decoder.num_layers", "1"),
    *("--model.decoder.ffn.d_e", "32", "--model.schedule.warmup_steps", "1", "--trainer.num_sanity_val_steps", "0"),
]


def validations(run_dir: Path) -> list[int]:
    lines = (run_dir / "history.jsonl").read_text().splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["event"] == "validation"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_weights_are_validated_once(corpus, tmp_path, ranks):
    options = {
        **{"--data.path": corpus, "--data.micro_batch_size": 2, "--run_dir": tmp_path, "--trainer.devices": ranks},
        **{"--trainer.accumulate_grad_batches": 2, "--trainer.val_check_interval": 4, "--trainer.limit_val_batches": 2},
    }
    args = [*MODEL, *(str(word) for pair in options.items() for word in pair), "--ckpt_path", "auto"]

    def fit(max_steps: int) -> str:
        command = [sys.executable, "-m", "mhf_lightning.cli", "fit", *args, "--trainer.max_steps", str(max_steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "validation at step 5" in fit(5)
    assert validations(tmp_path) == [2, 4, 5]
    assert "learning-rate schedule" not in fit(5)  # it is done
    assert validations(tmp_path) == [2, 4, 5]
    printed = fit(8)
    assert validations(tmp_path) == [2, 4, 5, 6, 8]  # the last is due by the interval too
    line = "the learning-rate schedule has 8 steps, and had 5 when the checkpoint was saved; "
    assert printed.count(line + "--model.schedule.total_steps 5 keeps it as it was") == 1


def test_passes_over_the_data_are_counted(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} few words. " * 40)
    data = tmp_path / "data"
    prepare([f"{tmp_path}/*.txt"], str(data), context_length=16, vocab_size=300, num_workers=1)
    blocks = Manifest.load(data).splits["train"].blocks

    def fit(name: str, steps: int, batch: int) -> str:
        options = ["--data.path", str(data), "--data.micro_batch_size", str(batch), "--run_dir", str(tmp_path / name)]
        return mhf("fit", *MODEL, *options, "--trainer.limit_val_batches", "0", "--trainer.max_steps", str(steps))

    assert " passes over " not in fit("once", 1, blocks)
    twice = f"2 steps of {blocks} blocks are 2.00 passes over the {blocks} training blocks of {data}"
    assert fit("twice", 2, blocks).count(f"{twice}\n") == 1
    larger = (
        f"1 steps of {2 * blocks} blocks are 2.00 passes over the {blocks} training blocks of {data}: each step sees"
    )
    assert fit("larger", 1, 2 * blocks).count(larger) == 1
