"""Signals at every moment to one rank or both: both save the same step, leave with a code for it, and go on exactly."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from stopping_run import STEPS, Case, events, losses, output, start, wait

from mhf_lightning.callbacks.preemption import EXIT_INTERRUPTED, EXIT_PREEMPTED
from mhf_lightning.checkpoint.folder import checkpoints
from mhf_lightning.data.prepare import prepare

pytestmark = [pytest.mark.slow, pytest.mark.serial]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    files = [str(path) for path in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))]
    prepare(files, str(folder), context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
    return str(folder)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Case:
    """A run that nobody stops."""
    case = Case(tmp_path_factory.mktemp("whole"), corpus)
    assert wait(case, start(case)) == [0, 0], output(case)
    assert list(losses(case)) == list(range(1, STEPS + 1))
    assert list(losses(case, "validated")) == [4, 8, 12]
    return case


MOMENTS = {
    "before the first step": ({"moment": "sanity check", "ranks": (1,)}, 0),
    "a step, one rank": ({"moment": "step 6", "ranks": (1,)}, 7),
    "a step, both ranks, SIGTERM": ({"moment": "step 6", "ranks": (0, 1), "number": signal.SIGTERM}, 7),
    "a step, one rank, SIGINT": ({"moment": "step 6", "ranks": (1,), "number": signal.SIGINT}, 7),
    "a step, both ranks, SIGINT": ({"moment": "step 6", "ranks": (0, 1), "number": signal.SIGINT}, 7),
    "the step before validation": ({"moment": "step 4", "ranks": (0, 1)}, 5),
    "validation": ({"moment": "validation after step 4", "ranks": (1,)}, 5),
    "validation, SIGINT": ({"moment": "validation after step 4", "ranks": (0, 1), "number": signal.SIGINT}, 5),
    "a save": ({"moment": "save of step 5", "ranks": (0,)}, 7),
    "a rank that becomes slow": ({"moment": "step 6", "ranks": (0,), "slow_rank": 1}, 7),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_both_ranks_save_leave_and_go_on(whole, corpus, tmp_path, name):
    options, step = MOMENTS[name]
    case = Case(tmp_path, corpus, **options)
    codes = wait(case, start(case))
    code = EXIT_INTERRUPTED if case.number == signal.SIGINT else EXIT_PREEMPTED
    assert codes == [code, code], output(case)
    done = [max((event["step"] for event in events(case, rank) if "step" in event), default=0) for rank in range(2)]
    assert done[0] == done[1] < STEPS
    assert done[0] == step
    assert max(checkpoints(case.folder / "checkpoints"), default=0) == done[0]

    after = Case(tmp_path, corpus)
    assert wait(after, start(after)) == [0, 0], output(after)
    assert [event["start"] for event in events(after) if "start" in event] == [0, done[0]]
    assert losses(after) == losses(whole)
    assert losses(after, "validated") == losses(whole, "validated")


def test_a_signal_during_compilation(corpus, tmp_path):
    case = Case(tmp_path, corpus, moment="compilation", ranks=(0, 1), compile_blocks=True)
    assert wait(case, start(case), 400) == [EXIT_PREEMPTED, EXIT_PREEMPTED], output(case)
    assert any("sent" in event for event in events(case))


@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_during_imports(corpus, tmp_path, ignored):
    """To the real command, also started as slurm/rank.sh does, with the signals ignored."""
    config = tmp_path / "config.yaml"
    ffn = {"name": "flash_mhf", "num_heads": 2, "num_subnetworks": 2, "d_e": 16}
    model = {"decoder": {"vocab_size": 300, "d_model": 32, "num_layers": 2, "num_attention_heads": 2, "ffn": ffn}}
    model["schedule"] = {"warmup_steps": 1}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "enable_progress_bar": False}
    data = {"path": corpus, "micro_batch_size": 2}
    config.write_text(yaml.safe_dump({"model": model, "trainer": trainer, "data": data}))
    command = [sys.executable, "-m", "mhf_lightning.cli", "fit", "--config", str(config)]
    command += ["--run_dir", str(tmp_path / "run"), "--ckpt_path", "auto"]
    if ignored:
        command = ["bash", "-c", 'trap "" USR1 TERM USR2; exec "$@"', "rank", *command]
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        blocks = Path(f"/proc/{process.pid}/status")
        while not int(blocks.read_text().partition("SigBlk:")[2].split()[0], 16) & 1 << signal.SIGUSR1 - 1:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGUSR1)
        if "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            break
        process.kill()  # its imports were further than they should be; on a busy machine that happens
        process.communicate()
    else:
        pytest.fail("the imports were too quick for this test")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == EXIT_PREEMPTED, printed
    assert list(checkpoints(tmp_path / "run/checkpoints")) == []
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert list(checkpoints(tmp_path / "run/checkpoints")) == [3]
