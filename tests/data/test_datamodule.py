import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from mhf_lightning.data.blocks import IGNORE_INDEX
from mhf_lightning.data.datamodule import TokenDataModule
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import Manifest
from mhf_lightning.data.sampler import GlobalOrderSampler

OPTIONS = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
           "enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}  # fmt: skip


class Recorder(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "validation": [], "test": [], "predict": []}
        self.targets = 0

    def training_step(self, batch, index):
        self.seen["train"].append(batch["sample_index"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.seen["validation"].append(batch["sample_index"].tolist())
        self.targets += batch["labels"].ne(IGNORE_INDEX).sum().item()

    def test_step(self, batch, index):
        self.seen["test"].append(batch["sample_index"].tolist())

    def predict_step(self, batch, index):
        self.seen["predict"].append(batch["sample_index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, **options):
    recorder = Recorder()
    trainer = pl.Trainer(**{**OPTIONS, "max_steps": 3, **options})
    trainer.fit(recorder, datamodule=data)
    return recorder, trainer


def flat(batches):
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_fit_validate_test_predict(prepared, workers):
    data = TokenDataModule(str(prepared), 4, num_workers=workers, seed=9, val_micro_batch_size=3)
    recorder, trainer = fit(data, accumulate_grad_batches=2, val_check_interval=4, check_val_every_n_epoch=None)
    manifest = Manifest.load(prepared)
    order = list(GlobalOrderSampler(manifest.splits["train"].blocks, 24, 9, micro_batch_size=4))
    assert recorder.seen["train"] == order
    blocks = manifest.splits["validation"].blocks
    assert blocks % 3  # or there is no padding to see
    for stage in (trainer.test, trainer.predict):
        stage(recorder, datamodule=data)
    for stage in ("validation", "test", "predict"):
        assert {len(batch) for batch in recorder.seen[stage]} == {3}
        assert flat(recorder.seen[stage]) == [*range(blocks), *[-1] * (-blocks % 3)]
    assert recorder.targets == manifest.splits["validation"].tokens - 1


def test_consumed_samples_moves_the_start_and_not_the_length(prepared):
    data = TokenDataModule(str(prepared), 2)
    whole, _ = fit(data, max_steps=5)
    data.consumed_samples = 6
    assert len(data.train_dataloader()) == 5
    assert [batch["sample_index"].tolist() for batch in data.train_dataloader()] == whole.seen["train"][3:]


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_leave_the_global_random_state_alone(prepared, workers):
    data = TokenDataModule(str(prepared), 2, num_workers=workers)
    fit(data)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_document_masking_reaches_the_batches(prepared):
    data = TokenDataModule(str(prepared), 2, document_masking=True)
    fit(data)
    batch = next(iter(data.train_dataloader()))
    assert batch["position_ids"].shape == batch["document_ids"].shape == batch["input_ids"].shape == (2, 64)
    assert batch["document_ids"].max() > 0


def test_state(prepared, dataset):
    data = TokenDataModule(str(prepared), 2, seed=7)
    data.consumed_samples = 12
    state = json.loads(json.dumps(data.state_dict()))
    assert state["tokenizer_sha256"] == hashlib.sha256((dataset / "tokenizer.json").read_bytes()).hexdigest()
    again = TokenDataModule(str(dataset), 2, seed=7)  # a copy of the dataset elsewhere
    again.load_state_dict(state)
    assert again.consumed_samples == 12
    with pytest.raises(DataError, match=r"seed 7, data.seed is 8. Set data.seed to 7"):
        TokenDataModule(str(prepared), 2, seed=8).load_state_dict(state)
    with pytest.raises(DataError, match=r"trained on another dataset.*Set data.path"):
        again.load_state_dict({**state, "dataset_id": "0" * 64})


def test_max_steps_is_required(prepared):
    with pytest.raises(ValueError, match=r"set trainer.max_steps"):
        fit(TokenDataModule(str(prepared), 2), max_steps=-1, max_epochs=1)


def test_a_run_that_is_over(prepared):
    data = TokenDataModule(str(prepared), 2)
    data.consumed_samples = 8
    with pytest.raises(DataError, match=r"8 samples were consumed already.*Raise trainer.max_steps"):
        fit(data)


def test_missing_dataset(tmp_path):
    data = TokenDataModule(str(tmp_path / "nowhere"), 2)
    with pytest.raises(DataError, match=r"nowhere does not exist. Make one with 'mhf data prepare"):
        fit(data)
    with pytest.raises(DataError, match="nowhere does not exist"):
        _ = data.manifest


def test_damage_is_found_before_the_first_step(dataset):
    path = dataset / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"B", b"C", 1))
    with pytest.raises(DataError, match=r"tokenizer.json was edited"):
        fit(TokenDataModule(str(dataset), 2))
    fit(TokenDataModule(str(dataset), 2, verify_hashes=False))


@pytest.mark.parametrize("name", ["micro_batch_size", "num_workers", "seed", "val_micro_batch_size"])
def test_bad_values(name):
    with pytest.raises(DataError, match=rf"data.{name} is -1"):
        TokenDataModule(**{"path": "data/quickstart", "micro_batch_size": 2, name: -1})


def test_config_names_every_argument_with_a_comment():
    import inspect

    path = Path(__file__).parents[2] / "configs" / "data" / "default.yaml"
    arguments = yaml.safe_load(path.read_text())["data"]
    parameters = inspect.signature(TokenDataModule).parameters
    assert list(arguments) == list(parameters)
    lines = path.read_text().splitlines()
    for name, parameter in parameters.items():
        position = next(number for number, line in enumerate(lines) if line.startswith(f"  {name}:"))
        comment = lines[position - 1].strip()
        assert comment.startswith("# ")
        if parameter.default is inspect.Parameter.empty:
            assert comment.endswith(", required)")
        else:
            default = yaml.safe_load(comment.rpartition("default ")[2].rstrip(")"))
            assert default == parameter.default == arguments[name]
    TokenDataModule(**arguments)


SCRIPT = """
import json, sys
from pathlib import Path
from test_datamodule import OPTIONS, Recorder, TokenDataModule, pl
path, workers, out = sys.argv[1:]
recorder = Recorder()
data = TokenDataModule(path, 2, num_workers=int(workers), val_micro_batch_size=30)
trainer = pl.Trainer(**OPTIONS, max_steps=4, accumulate_grad_batches=2, strategy="ddp", devices=2,
                     val_check_interval=8, check_val_every_n_epoch=None)
trainer.fit(recorder, datamodule=data)
trainer.predict(recorder, datamodule=data)
Path(out, f"{trainer.global_rank}.json").write_text(json.dumps([recorder.seen, recorder.targets]))
"""


def test_two_ranks(prepared, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, tmp_path / "script.py", prepared, "0", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (first, first_targets), (second, second_targets) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    manifest = Manifest.load(prepared)
    alone = flat(GlobalOrderSampler(manifest.splits["train"].blocks, 32, 1234, micro_batch_size=4))
    together = [sample for pair in zip(first["train"], second["train"], strict=True) for sample in flat(pair)]
    assert together == alone
    blocks = manifest.splits["validation"].blocks
    for stage in ("validation", "predict"):
        assert len(first[stage]) == len(second[stage])
        samples = flat(first[stage]) + flat(second[stage])
        assert sorted(sample for sample in samples if sample >= 0) == list(range(blocks))
    assert first_targets + second_targets == manifest.splits["validation"].tokens - 1
