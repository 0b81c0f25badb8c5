"""DeepSpeed's own files, committed and verified like ours."""

import importlib.util

import pytest
from small_run import Run, Started, expected_history, finish, history, losses, replace

from mhf_lightning.checkpoint.folder import checkpoints, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.serial,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra 'deepspeed'"),
]


def test_zero_2_is_committed_verified_and_resumed(small_corpus, tmp_path):
    whole = Run(small_corpus, str(tmp_path / "whole"), strategy="zero2", ranks=2, max_steps=6)
    finish(whole)
    run = replace(whole, folder=str(tmp_path / "cut"))
    finish(replace(run, stop_at=3))
    assert verify(run.checkpoints / "step-3").kind == "deepspeed"
    assert (run.checkpoints / "latest").read_text() == "step-3\n"
    finish(run, ckpt_path="auto")
    assert history(run) == history(whole) == expected_history(run, 16, 6)
    assert losses(run.logs()) == losses(whole.logs())
    assert list(checkpoints(run.checkpoints)) == [6, 3]

    other = Started(replace(run, strategy="ddp", max_steps=9), "auto")
    assert other.wait() == [1, 1]
    assert "is a deepspeed checkpoint, MHFDDP reads sharded ones" in other.output()
    for file in (run.checkpoints / "step-6").rglob("*optim_states.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    printed = finish(replace(run, max_steps=9), ckpt_path="auto")
    assert "skipped a checkpoint" in printed
    assert "optim_states.pt is damaged" in printed
