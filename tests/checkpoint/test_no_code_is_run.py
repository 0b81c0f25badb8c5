"""Loading a checkpoint runs no code: every file of one is replaced by a payload in turn, hashes made to match."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from mhf_lightning.checkpoint.files import CheckpointError
from mhf_lightning.checkpoint.folder import MANIFEST, Manifest, sync_and_list, verify
from mhf_lightning.checkpoint.shards import Ranks, Reader, SaveOptions, snapshot, write
from mhf_lightning.checkpoint.strategy import MHFSingleDevice

FILES = ["manifest.json", "index.json", "trainer.json", "trainer.safetensors", "shard-00000.safetensors"]


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def payloads(canary: Path) -> dict[str, bytes]:
    pickled = pickle.dumps(Canary(canary))
    saved = io.BytesIO()
    torch.save({"state_dict": Canary(canary)}, saved)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return {"pickle": pickled, "torch.save": saved.getvalue(), "zip": archive.getvalue()}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path, ranks = tmp_path / "step-3", Ranks()
    state = {"model/w": torch.arange(6.0)}
    trainer = {"global_step": 3, "optimizer_states": [], "rng": {"__tensor__": "trainer.rng"}}
    content = snapshot(state, (trainer, {"trainer.rng": torch.arange(5)}), ranks)
    write(path, content, 3, {}, ranks, SaveOptions())
    return path


def load(path: Path) -> torch.Tensor:
    strategy = MHFSingleDevice("cpu")
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(6))
    strategy._lightning_module = module
    strategy.load_model_state_dict(strategy.load_checkpoint(path))
    return module.w.detach()


def test_the_untouched_checkpoint_loads(checkpoint):
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(FILES)
    assert load(checkpoint).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_the_payloads_are_live(tmp_path):
    """What is planted below would act if anything unpickled it."""
    for name, payload in payloads(tmp_path / "canary").items():
        if name == "pickle":
            pickle.loads(payload)
        elif name == "torch.save":
            torch.load(io.BytesIO(payload), weights_only=False)
        else:
            pickle.loads(zipfile.ZipFile(io.BytesIO(payload)).read("archive/data.pkl"))
        assert (tmp_path / "canary").exists(), name
        (tmp_path / "canary").unlink()


@pytest.mark.parametrize("payload", ["pickle", "torch.save", "zip"])
@pytest.mark.parametrize("name", FILES)
def test_a_payload_is_refused_and_does_nothing(checkpoint, tmp_path, name, payload):
    canary = tmp_path / "canary"
    (checkpoint / name).write_bytes(payloads(canary)[payload])
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)  # the hash differs
    if name != MANIFEST:
        (checkpoint / MANIFEST).unlink()
        Manifest(3, "sharded", sync_and_list(checkpoint)).save(checkpoint)
        verify(checkpoint)
        with pytest.raises(CheckpointError, match=name):
            load(checkpoint)  # the hash was made to match: the reader itself refuses
    assert not canary.exists()


def test_files_that_the_manifest_does_not_name_are_not_read(checkpoint, tmp_path):
    for name in (".metadata", "meta.pt", "shard-00001.safetensors", "extra.pkl"):
        (checkpoint / name).write_bytes(payloads(tmp_path / "canary")["pickle"])
    assert load(checkpoint).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["chunks"][0].update(file="../../etc/passwd"), "is no shard"),
        (lambda e: e["chunks"][0].update(offsets=[1]), "lies outside"),
        (lambda e: e["chunks"][0].update(offsets=[-1]), "damaged"),
        (lambda e: e["chunks"].clear(), "do not make it up"),
        (lambda e: e.update(dtype="object"), "object"),
        (lambda e: e.update(shape="6"), "damaged"),
        (lambda e: e.update(shape=[7]), "do not make it up"),
    ],
)
def test_an_index_that_lies_is_refused(checkpoint, change, message):
    index = json.loads((checkpoint / "index.json").read_text())
    change(index["model/w"])
    (checkpoint / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Reader(checkpoint)


def test_deeply_nested_json_is_refused(checkpoint):
    (checkpoint / "index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        Reader(checkpoint)
