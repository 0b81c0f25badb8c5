"""The newest checkpoint of a real run damaged in every way, and a disk that is full: the one before is used."""

import re
import subprocess

import pytest
from small_run import Run, Started, assert_equal, finish, history, losses, replace

from mhf_lightning.checkpoint.folder import checkpoints, find_newest_valid, verify

pytestmark = pytest.mark.serial
FILES = [
    "shard-00000.safetensors",
    "shard-00001.safetensors",
    "index.json",
    "trainer.json",
    "trainer.safetensors",
    "manifest.json",
]


@pytest.fixture(scope="module")
def finished(small_corpus, tmp_path_factory) -> Run:
    """A run on two ranks with checkpoints at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    run = Run(small_corpus, str(folder), strategy="fsdp2", ranks=2, max_steps=6, accumulate=1)
    finish(run)
    return run


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :]


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "one bit flipped": flip,
    "missing": None,
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_the_previous_checkpoint_is_chosen_and_the_file_named(finished, name, damage):
    path = finished.checkpoints / "step-6" / name
    content = path.read_bytes()
    try:
        if DAMAGES[damage] is None:
            path.unlink()
        else:
            path.write_bytes(DAMAGES[damage](content))
        chosen, messages = find_newest_valid(finished.checkpoints)
        assert chosen == finished.checkpoints / "step-3"
        (message,) = messages
        assert str(path) in message
    finally:
        path.write_bytes(content)
    verify(finished.checkpoints / "step-6")


def test_a_run_resumed_before_the_damage_ends_the_same(finished, tmp_path):
    whole = replace(finished, folder=str(tmp_path / "whole"), max_steps=9)
    finish(whole)
    path = finished.checkpoints / "step-6/shard-00001.safetensors"
    path.write_bytes(flip(path.read_bytes()))
    printed = finish(replace(finished, max_steps=9), ckpt_path="auto")
    assert f"skipped a checkpoint: {path} is damaged" in printed
    assert history(finished) == history(whole)
    assert losses(finished.logs()) == losses(whole.logs())
    assert_equal(finished.checkpoints / "step-9", whole.checkpoints / "step-9")


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_stops_the_run_and_leaves_the_previous_checkpoint(small_corpus, tmp_path, small_disk, background):
    whole = Run(small_corpus, str(tmp_path / "whole"), strategy="ddp", ranks=2, max_steps=3, accumulate=1)
    finish(whole)
    run = replace(whole, folder=str(small_disk), keep=9, every=1, background=background, max_steps=100)
    started = Started(run)
    assert started.wait() == [1, 1]
    printed = started.output()
    named = re.search(rf"{small_disk}/checkpoints/step-\d+\.tmp/\S+ could not be written: No space left", printed)
    assert named, printed
    steps = list(checkpoints(run.checkpoints))
    assert 1 <= len(steps) < 100
    assert all(verify(path).step == step for step, path in checkpoints(run.checkpoints).items())
    assert list(run.checkpoints.glob("*.tmp")) == []
    assert (run.checkpoints / "latest").read_text() == f"step-{steps[0]}\n"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    finish(replace(run, every=50, max_steps=steps[0] + 2), ckpt_path="auto")
    finish(replace(whole, max_steps=steps[0] + 2), ckpt_path="auto")
    assert_equal(run.checkpoints / f"step-{steps[0] + 2}", whole.checkpoints / f"step-{steps[0] + 2}")
