"""10 steps against 5 + resume + 5: losses, weights and optimiser bitwise equal."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from mhf_lightning.callbacks.checkpoint import CheckpointConfig, StepCheckpoint
from mhf_lightning.checkpoint import strategy
from mhf_lightning.checkpoint.files import CheckpointError
from mhf_lightning.checkpoint.folder import checkpoints, verify
from mhf_lightning.checkpoint.shards import Saver, write
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.data.datamodule import TokenDataModule
from mhf_lightning.data.manifest import Manifest
from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig
from mhf_lightning.training.weights import check_config


class Recorder(Callback):
    """Keeps what every optimiser step logged, and the samples it read; stops after a step when asked to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.samples: list[int] = []
        self.stop_after = stop_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.samples += batch["sample_index"].tolist()
        self.losses[trainer.global_step] = trainer.callback_metrics.get("train/loss", torch.tensor(float("nan"))).item()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.stop_after:  # the checkpoint of this step is written by now
            raise KeyboardInterrupt


class Validations(Callback):
    """Keeps what every validation found, by step; is killed in or right after one when asked to."""

    def __init__(self, kill_at: int | None = None, in_batch: int | None = None) -> None:
        self.losses: dict[int, list[float]] = {}
        self.kill_at, self.in_batch = kill_at, in_batch

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not trainer.sanity_checking and (trainer.global_step, batch_idx) == (self.kill_at, self.in_batch):
            raise KeyboardInterrupt

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.losses.setdefault(trainer.global_step, []).append(trainer.callback_metrics["val/loss"].item())
            if trainer.global_step == self.kill_at and self.in_batch is None:
                raise KeyboardInterrupt


def run(
    corpus: Path,
    config,
    folder: Path,
    workers: int,
    stop_after=None,
    ckpt_path=None,
    seed=7,
    extra=None,
    every=5,
    keep_every=None,
    max_steps=10,
    **optimizer,
):
    seed_everything(seed)
    recorder = Recorder(stop_after)
    module = PretrainModule(
        config,
        OptimizerConfig(**({"lr": 1e-2, "grad_clip": 0.5} | optimizer)),
        ScheduleConfig(warmup_steps=3, total_steps=10),
        z_loss=1e-4,
    )
    trainer = Trainer(
        strategy=MHFSingleDevice("cpu"),
        devices=1,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=4,
        val_check_interval=12,  # micro-batches: validation after steps 3, 6 and 9, and after the last
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            StepCheckpoint(folder, CheckpointConfig(every, keep_every_n_steps=keep_every)),
            recorder,
            *([extra] if extra else []),
        ],
    )
    data = TokenDataModule(str(corpus), micro_batch_size=3, num_workers=workers)
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):
        assert stop_after is not None or extra is not None
    return recorder, module, trainer


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_bitwise_exact(corpus, decoder_config, tmp_path, workers):
    whole, module, trainer = run(corpus, decoder_config, tmp_path / "whole", workers)
    first, _, _ = run(corpus, decoder_config, tmp_path / "cut", workers, stop_after=5)
    assert max(first.losses) == 5
    second, resumed, resumed_trainer = run(
        corpus, decoder_config, tmp_path / "cut", workers, ckpt_path=tmp_path / "cut" / "step-5", seed=99
    )

    assert first.samples + second.samples == whole.samples
    assert len(whole.samples) == 10 * 4 * 3
    for step in range(1, 11):
        recorded = (first if step <= 5 else second).losses[step]
        assert recorded == whole.losses[step], f"step {step}"
    for key, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for ours, theirs in zip(trainer.optimizers, resumed_trainer.optimizers, strict=True):
        for a, b in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert resumed.tokens_seen == module.tokens_seen == 10 * 4 * 3 * 16


@pytest.mark.parametrize("in_batch", [0, 1, None])  # None: after it
@pytest.mark.parametrize("kill_at", [3, 9])
def test_a_kill_in_a_validation_loses_no_point(corpus, decoder_config, tmp_path, kill_at, in_batch):
    """Checkpoints and validations come at the same steps; the checkpoint is saved first, and not at the last step."""
    whole, first, second = Validations(), Validations(kill_at, in_batch), Validations()
    recorder, module, _ = run(corpus, decoder_config, tmp_path / "whole", 0, extra=whole, every=3)
    run(corpus, decoder_config, tmp_path / "cut", 0, extra=first, every=3)
    assert max(checkpoints(tmp_path / "cut")) == kill_at
    path = tmp_path / "cut" / f"step-{kill_at}"
    resumed_recorder, resumed, _ = run(
        corpus, decoder_config, tmp_path / "cut", 0, ckpt_path=path, extra=second, every=3
    )

    assert {**first.losses, **second.losses} == whole.losses
    assert all(len(values) == 1 for values in second.losses.values())
    assert sorted(second.losses) == [step for step in (3, 6, 9, 10) if step >= kill_at]
    for step in range(kill_at + 1, 11):
        assert resumed_recorder.losses[step] == recorder.losses[step]
    for key, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_the_last_step_is_saved_with_its_validation_done(corpus, decoder_config, tmp_path):
    """A run whose steps are done does not train again: a validation that it lacks would be lost for good."""
    killed, resumed = Validations(9, 1), Validations()
    run(corpus, decoder_config, tmp_path, 0, extra=killed, every=3, max_steps=9)
    assert max(checkpoints(tmp_path)) == 6
    run(corpus, decoder_config, tmp_path, 0, ckpt_path=tmp_path / "step-6", extra=resumed, every=3, max_steps=9)
    assert sorted(resumed.losses) == [6, 9]
    assert max(checkpoints(tmp_path)) == 9


@pytest.mark.parametrize("length", [7, 9])  # with a validation after its last step alone, and as in a long run
def test_a_run_made_longer_ends_as_one_that_was_always_long(corpus, decoder_config, tmp_path, length):
    whole, first, second = Validations(), Validations(), Validations()
    recorder, module, trainer = run(corpus, decoder_config, tmp_path / "whole", 0, extra=whole)
    begun, _, _ = run(corpus, decoder_config, tmp_path / "cut", 0, extra=first, max_steps=length)
    path = tmp_path / "cut" / f"step-{length}"
    longer, resumed, resumed_trainer = run(corpus, decoder_config, tmp_path / "cut", 0, ckpt_path=path, extra=second)
    assert begun.samples + longer.samples == recorder.samples
    for step in range(1, 11):
        assert (begun if step <= length else longer).losses[step] == recorder.losses[step], f"step {step}"
    if length == 7:
        del first.losses[7]
    assert {**first.losses, **second.losses} == whole.losses
    assert len(first.losses) + len(second.losses) == len(whole.losses)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 10  # the axis of the curves
    assert resumed_trainer.fit_loop.epoch_loop._batches_that_stepped == 10
    assert resumed_trainer.current_epoch == trainer.current_epoch
    for key, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_dropout_makes_the_random_state_matter(corpus, decoder_config, tmp_path, monkeypatch):
    """Without the restored generators the losses after the resume differ: the test above can fail."""
    whole, _, _ = run(corpus, decoder_config, tmp_path / "whole", 0)
    run(corpus, decoder_config, tmp_path / "cut", 0, stop_after=5)
    monkeypatch.setattr("mhf_lightning.callbacks.exact_resume.set_rng_state", lambda state: None)
    second, _, _ = run(corpus, decoder_config, tmp_path / "cut", 0, ckpt_path=tmp_path / "cut" / "step-5", seed=99)
    assert second.losses[7] != whole.losses[7]


def test_another_architecture_is_refused_with_the_keys(corpus, decoder_config, tmp_path):
    run(corpus, decoder_config, tmp_path, 0, stop_after=5)
    decoder_config.ffn.d_e = 48
    with pytest.raises(
        ValueError, match=r"another architecture(.|\n)*ffn\.k: model \(2, 2, 48, 16\), checkpoint \(2, 2, 32, 16\)"
    ):
        run(corpus, decoder_config, tmp_path, 0, ckpt_path=tmp_path / "step-5")


def test_a_finished_run_keeps_two_checkpoints_and_names_the_newest(corpus, decoder_config, tmp_path):
    run(corpus, decoder_config, tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"step-5", "step-10", "latest"}
    assert (tmp_path / "latest").read_text() == "step-10\n"
    assert verify(tmp_path / "step-10").about["consumed_samples"] == 10 * 4 * 3


def test_every_nth_checkpoint_is_kept(corpus, decoder_config, tmp_path):
    run(corpus, decoder_config, tmp_path, 0, every=1, keep_every=4)
    assert list(checkpoints(tmp_path)) == [10, 9, 8, 4]


def test_at_most_one_save_is_in_flight(corpus, decoder_config, tmp_path, monkeypatch):
    """Saves that take longer than the steps between them."""
    asked, done, in_flight = [], [], []
    real_write, real_run = strategy.write, Saver.run

    def slow_write(path, *args):
        time.sleep(0.2)
        real_write(path, *args)
        done.append(path.name)

    def counted_run(saver, work, background):
        real_run(saver, work, background)
        asked.append(work)
        in_flight.append(len(asked) - len(done))

    monkeypatch.setattr(strategy, "write", slow_write)
    monkeypatch.setattr(Saver, "run", counted_run)
    run(corpus, decoder_config, tmp_path, 0, every=1)
    assert done == [f"step-{step}" for step in range(1, 11)]
    assert in_flight == [1] * 10  # each went on beside training, after the one before it had ended


def test_what_no_shape_shows_is_refused_too(corpus, decoder_config, tmp_path):
    run(corpus, decoder_config, tmp_path, 0, stop_after=5)
    decoder_config.num_attention_heads, decoder_config.tie_embeddings = 4, False
    with pytest.raises(ValueError, match=r"num_attention_heads: model 4, checkpoint 2; tie_embeddings: model False"):
        run(corpus, decoder_config, tmp_path, 0, ckpt_path=tmp_path / "step-5")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 5e-1}, "begun with lr 0.01, and this start has 0.5; leave model.optimizer as it was"),
        ({"weight_decay": 0.7}, "begun with weight_decay 0.1, and this start has 0.7"),
        ({"beta2": 0.99}, r"begun with betas \(0.9, 0.95\), and this start has \(0.9, 0.99\)"),
    ],
)
def test_another_optimiser_is_refused(corpus, decoder_config, tmp_path, changed, message):
    run(corpus, decoder_config, tmp_path, 0, stop_after=5)
    with pytest.raises(ValueError, match=message):
        run(corpus, decoder_config, tmp_path, 0, ckpt_path=tmp_path / "step-5", **changed)


def test_a_resume_does_not_save_in_the_middle_of_a_step(corpus, decoder_config, tmp_path):
    run(corpus, decoder_config, tmp_path, 0, stop_after=5)
    before = (tmp_path / "latest").read_bytes()

    class StopInWindow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 22:  # the second of step 6's four
                raise KeyboardInterrupt

    run(corpus, decoder_config, tmp_path, 0, stop_after=10, ckpt_path=tmp_path / "step-5", extra=StopInWindow())
    assert (tmp_path / "latest").read_bytes() == before == b"step-5\n"
    assert list(checkpoints(tmp_path)) == [5]


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(corpus, decoder_config, tmp_path):
    decoder_config.vocab_size = 200
    with pytest.raises(ValueError, match=r"tokenizer has 300 tokens.*vocab_size is 200"):
        run(corpus, decoder_config, tmp_path, 0)


def test_weights_whose_tokenizer_is_not_that_of_the_data_are_warned_of(corpus, decoder_config, tmp_path, recwarn):
    module = PretrainModule(decoder_config, init_from=str(tmp_path / "model.safetensors"))
    data = SimpleNamespace(path=str(corpus), manifest=Manifest.load(corpus))
    module._trainer = SimpleNamespace(gradient_clip_val=None, datamodule=data)
    tokenizer = json.loads((corpus / "tokenizer.json").read_text())
    module.setup("fit")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
    module.setup("fit")
    assert not recwarn
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(
        UserWarning, match=rf"{corpus}/tokenizer.json is not {tmp_path}/tokenizer.json; give that to mhf"
    ):
        module.setup("fit")


def test_another_gate_is_another_architecture():
    """No weight changes its shape with it."""
    softmax, sigmoid = (
        DecoderConfig(ffn=FFNConfig("flash_mhf", num_heads=4, num_subnetworks=2, d_e=16, gate=gate))
        for gate in ("softmax", None)
    )
    check_config(sigmoid, sigmoid.to_dict())
    with pytest.raises(ValueError, match=r"another architecture: ffn.gate: model softmax, checkpoint sigmoid"):
        check_config(softmax, sigmoid.to_dict())


def test_a_run_from_another_s_checkpoint_saves_between_steps(corpus, decoder_config, tmp_path):
    """At the first micro-batch of a branch the step is still that of the checkpoint, which is due for a save."""
    run(corpus, decoder_config, tmp_path / "whole", 0)
    run(corpus, decoder_config, tmp_path / "branch", 0, ckpt_path=tmp_path / "whole" / "step-5")
    (path,) = (tmp_path / "branch").glob("step-*")
    assert verify(path).files == verify(tmp_path / "whole" / "step-10").files


class AskToStop(Callback):
    """Asks in the middle of the third step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= batch_idx == 2 * 4 + 1


def test_a_request_to_stop_within_a_step_is_heard_at_its_end(corpus, decoder_config, tmp_path):
    _, module, trainer = run(corpus, decoder_config, tmp_path, 0, extra=AskToStop())
    assert trainer.global_step == 3
    assert module.tokens_seen == 3 * 4 * 3 * 16
    assert verify(tmp_path / "step-3").about["consumed_samples"] == 3 * 4 * 3


def test_a_background_save_that_fails_does_not_cost_the_next_one(corpus, decoder_config, tmp_path, monkeypatch):
    def fail_once(path, *args):
        if path.name == "step-8":
            raise CheckpointError("No space left on device")
        write(path, *args)

    monkeypatch.setattr(strategy, "write", fail_once)
    with pytest.warns(UserWarning, match="step-10 is saved, but the checkpoint before it is missing: No space left"):
        run(corpus, decoder_config, tmp_path, 0, every=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-4"]
    monkeypatch.setattr(strategy, "write", lambda *_: fail_once(Path("step-8")))
    with pytest.raises(CheckpointError, match="No space left"):
        run(corpus, decoder_config, tmp_path / "none", 0, every=4)
