"""Commit, verification, pruning and the choice of the newest valid checkpoint, on real folders."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mhf_lightning.callbacks.checkpoint import CheckpointConfig, StepCheckpoint
from mhf_lightning.checkpoint.files import CheckpointError, write_file, write_json, write_tensors
from mhf_lightning.checkpoint.folder import (
    Manifest,
    abandon,
    begin,
    checkpoints,
    commit,
    find_newest_valid,
    newest,
    point_latest,
    prepare_run,
    prune,
    verify,
)
from mhf_lightning.checkpoint.shards import SaveOptions, Snapshot, Staging, after_commit


def save(folder, step):
    path = folder / f"step-{step}"
    inside = begin(path)
    files = [
        write_tensors(inside / "shard-00000.safetensors", {"model/w": torch.full((50,), float(step))}),
        write_json(inside / "trainer.json", {"global_step": step}),
    ]
    commit(path, Manifest(step, "sharded", files, {"ranks": 1}))
    point_latest(path)
    return path


def flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def test_a_committed_checkpoint_verifies_and_is_named_by_latest(tmp_path):
    path = save(tmp_path, 7)
    manifest = verify(path)
    assert (manifest.step, manifest.kind, manifest.about) == (7, "sharded", {"ranks": 1})
    assert {entry.name for entry in manifest.files} == {"shard-00000.safetensors", "trainer.json"}
    assert (tmp_path / "latest").read_text() == "step-7\n"
    assert newest(tmp_path) == path
    assert load_file(path / "shard-00000.safetensors")["model/w"].tolist() == [7.0] * 50


def test_chunks_may_be_one_memory_that_is_filled_again(tmp_path):
    def chunks():
        memory = bytearray(1 << 22)
        for number in range(5):
            memory[:] = bytes([number]) * len(memory)
            yield memoryview(memory)

    entry = write_file(tmp_path / "file", chunks())
    content = b"".join(bytes([number]) * (1 << 22) for number in range(5))
    assert (tmp_path / "file").read_bytes() == content
    assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_copies_are_made_in_the_memory_of_the_last_ones():
    staging, weight, state = Staging(), torch.arange(4.0, requires_grad=True), torch.tensor([1])

    def copy():
        return staging.copy(Snapshot({"w": weight, "step": torch.tensor(7)}, {}, ({"a": 1}, {"rng": state})))

    first = copy()
    with torch.no_grad():
        weight += 1
    state += 1
    assert first.tensors["w"].tolist() == [0, 1, 2, 3]
    assert first.trainer[1]["rng"].tolist() == [1]
    second = copy()
    assert second.tensors["w"].tolist() == [1, 2, 3, 4]
    assert [second.tensors[name].data_ptr() for name in ("w", "step")] == [
        first.tensors[name].data_ptr() for name in ("w", "step")
    ]
    weight = weight.detach()[:3].double()
    third = copy()
    assert (third.tensors["w"].tolist(), third.tensors["w"].dtype) == ([1, 2, 3], torch.float64)
    assert second.tensors["w"].tolist() == [1, 2, 3, 4]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, as a GPU's."""

    is_cpu = property(lambda self: False)


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
def test_every_dtype_is_written_as_safetensors_reads_it(kind, tmp_path):
    torch.manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    tensors = {
        str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in [*dtypes, torch.int8, torch.uint8, torch.bool]
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "transposed": torch.randn(4, 6).t()}
    tensors["fp8"] = torch.randn(8).to(torch.float8_e4m3fn)
    write_tensors(tmp_path / "x.safetensors", {name: tensor.as_subclass(kind) for name, tensor in tensors.items()})
    read = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped first bit", "flipped bit", "flipped last bit"])
def test_damage_is_named_and_the_previous_one_used(tmp_path, name, damage):
    save(tmp_path, 5)
    path = save(tmp_path, 10) / name
    verify(path.parent)  # remembered hashes must not hide what happens now
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path, {"flipped first bit": 0, "flipped bit": None, "flipped last bit": -1}[damage])
    with pytest.raises(CheckpointError, match=rf"step-10/{name}"):
        newest(tmp_path)
    found, messages = find_newest_valid(tmp_path)
    assert found == tmp_path / "step-5"
    assert len(messages) == 1
    assert f"step-10/{name}" in messages[0]


def test_none_valid_is_refused_and_none_at_all_is_not(tmp_path):
    assert find_newest_valid(tmp_path / "nowhere") == (None, [])
    begin(tmp_path / "step-5")  # killed in its first save
    assert find_newest_valid(tmp_path) == (None, [])
    flip(save(tmp_path, 5) / "trainer.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used.*step-5/trainer.json"):
        find_newest_valid(tmp_path)


@pytest.mark.parametrize("trace", ["latest", "last.ckpt", "step-5.set-aside"])
def test_traces_of_lost_checkpoints_are_refused_too(tmp_path, trace):
    (tmp_path / trace).write_text("step-5\n")
    with pytest.raises(CheckpointError, match=f"no checkpoint can be used.*{trace}"):
        find_newest_valid(tmp_path)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    save(tmp_path, 5).rename(tmp_path / "step-50")
    with pytest.raises(CheckpointError, match="step-50 holds step 5"):
        verify(tmp_path / "step-50")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", ""])
def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    path = tmp_path / "step-1"
    path.mkdir()
    entry = write_file(path / "x", [b"x"])
    Manifest(1, "sharded", [type(entry)(name, entry.bytes, entry.sha256)]).save(path)
    with pytest.raises(CheckpointError, match="not in the folder"):
        verify(path)


def test_nothing_is_overwritten(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="step-5 exists already"):
        begin(tmp_path / "step-5")


def test_a_file_cut_between_write_and_commit_is_not_committed(tmp_path):
    folder = begin(tmp_path / "step-5")
    entry = write_file(folder / "x", [b"12345"])
    (folder / "x").write_bytes(b"123")
    with pytest.raises(CheckpointError, match=r"step-5.tmp/x: 3 bytes are there, 5 were written"):
        commit(tmp_path / "step-5", Manifest(5, "sharded", [entry]))
    abandon(tmp_path / "step-5")
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_last_and_every_nth(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step)
        prune(tmp_path, keep_last=2, keep_every=4)
    assert list(checkpoints(tmp_path)) == [10, 9, 8, 4]
    assert all(verify(path) for path in checkpoints(tmp_path).values())


def test_what_cannot_be_removed_yet_does_not_stop_the_run(tmp_path, monkeypatch):
    """NFS keeps a file that another process reads, under a name that begins with .nfs, and with it the folder."""
    unlink = os.unlink

    def refuse(path, **kwargs):
        if os.path.basename(path).startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path, **kwargs)

    for step in (1, 2, 3):
        (save(tmp_path, step) / f".nfs{step}").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.warns(UserWarning, match=r"step-1\.tmp could not be removed"):
            after_commit(tmp_path / "step-3", SaveOptions(keep_last=2))
        assert os.listdir(tmp_path / "step-1.tmp") == [".nfs1"]
        with pytest.warns(UserWarning, match=r"step-1\.tmp could not be removed"):
            assert prepare_run(tmp_path, 3) == []
        patch.setattr(Path, "rename", lambda *_: refuse(".nfs"))
        with pytest.warns(UserWarning, match=r"step-3 is saved, but older ones could not be removed: .* busy"):
            after_commit(tmp_path / "step-3", SaveOptions(keep_last=1))
    after_commit(tmp_path / "step-3", SaveOptions(keep_last=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2", "step-3"]


def test_a_latest_that_cannot_be_moved_does_not_stop_the_run(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").unlink(missing_ok=True)
    (tmp_path / "latest").mkdir()
    with pytest.warns(UserWarning, match=r"step-2 is saved, but 'latest' could not be moved to it: .*directory"):
        after_commit(tmp_path / "step-2", SaveOptions(keep_last=1))
    assert list(checkpoints(tmp_path)) == [2]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path):
    """Else `--ckpt_path auto` would begin again, and set aside what it could not see."""
    assert find_newest_valid(tmp_path / "nothing") == (None, [])
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(CheckpointError, match=r"checkpoints is a link to .*scratch, which is not there"):
        find_newest_valid(tmp_path / "checkpoints")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file cannot be read: Not a directory"):
        find_newest_valid(tmp_path / "file")


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_skipped(tmp_path, monkeypatch, name):
    save(tmp_path, 1)
    path, reads = save(tmp_path, 2) / name, {"read_bytes": Path.read_bytes, "open": Path.open}

    def refuse(method):
        def read(self, *args, **kwargs):
            if self == path:
                raise OSError(errno.EIO, "Input/output error", str(path))
            return reads[method](self, *args, **kwargs)

        return read

    for method in reads:
        monkeypatch.setattr(Path, method, refuse(method))
    assert find_newest_valid(tmp_path) == (tmp_path / "step-1", [f"{path} cannot be read: Input/output error"])


def test_a_run_that_goes_back_sets_later_checkpoints_aside(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    begin(tmp_path / "step-20")
    assert [path.name for path in prepare_run(tmp_path, 10)] == ["step-15.set-aside"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-15.set-aside", "step-5"]
    assert (tmp_path / "latest").read_text() == "step-10\n"
    save(tmp_path, 15)
    assert [path.name for path in prepare_run(tmp_path, 10)] == ["step-15.set-aside-2"]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_folder import save
print("ready", flush=True)
for step in range(1, 10000):
    save(Path(sys.argv[1]), step)
"""


def test_a_writer_killed_anywhere_leaves_whole_checkpoints(tmp_path):
    """One SIGKILL of a process that does nothing but save; the repeated, distributed one is in tests/faults."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        while len(checkpoints(tmp_path)) < 5:
            pass
        process.kill()
    found, messages = find_newest_valid(tmp_path)
    assert messages == []
    named = int((tmp_path / "latest").read_text().removeprefix("step-"))
    assert named in (verify(found).step, verify(found).step - 1)
    for step, path in checkpoints(tmp_path).items():
        assert json.loads((path / "trainer.json").read_text())["global_step"] == step
        assert (load_file(path / "shard-00000.safetensors")["model/w"] == step).all()


def test_the_step_of_another_run_s_checkpoint_is_not_taken_for_saved(tmp_path):
    """A run that began from it and is stopped at once has to leave a checkpoint of its own."""
    saved = []
    trainer = SimpleNamespace(is_global_zero=True, global_step=4, strategy=SimpleNamespace(broadcast=lambda x: x))
    trainer.save_checkpoint = lambda path, **_: saved.append(path)
    for _ in range(2):
        callback = StepCheckpoint(tmp_path, CheckpointConfig())
        callback.on_train_start(trainer, None)
        callback.save(trainer)
        (tmp_path / "step-4").mkdir(exist_ok=True)
    assert saved == [tmp_path / "step-4"]
