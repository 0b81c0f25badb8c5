"""A step that is not finite, left out by the optimiser on the device: no trace, and the host counts it a step later.

On the CPU by the fused AdamW, which is asked for here; several ranks are in tests/distributed, resumes in
tests/checkpoint.
"""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from mhf_lightning.checkpoint.folder import checkpoints
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.training import module as training
from mhf_lightning.training.module import NonFiniteError, PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig

CONFIG = DecoderConfig(vocab_size=40, d_model=16, num_layers=1, num_attention_heads=2, ffn=FFNConfig("swiglu", 24))
STEPS = 6


class Data(LightningDataModule):
    """Two micro-batches of two sequences a step."""

    def train_dataloader(self):
        tokens = torch.randint(40, (4 * STEPS, 9), generator=torch.Generator().manual_seed(3))
        items = [{"input_ids": t[:-1], "labels": t[1:], "sample_index": torch.tensor(i)} for i, t in enumerate(tokens)]
        return DataLoader(items, batch_size=2)

    def val_dataloader(self):
        return self.train_dataloader()


class Poisoned(PretrainModule):
    """Has gradients that are not finite in some steps, counted from 0."""

    poisoned: tuple[int, ...] = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step in self.poisoned:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["fused"] = True  # as on a GPU
        return configured


class Watch(Callback):
    """Keeps what is known at the end of each step, and the weights then."""

    def __init__(self) -> None:
        self.counted: list[int] = []
        self.logged: list[float] = []
        self.weights: list[list[torch.Tensor]] = []
        self.ended = self.validated = False

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not trainer.fit_loop._should_accumulate():
            self.counted.append(pl_module.skipped_steps)
            self.logged.append(trainer.callback_metrics["train/skipped_steps"].item())
            self.weights.append([p.detach().clone() for p in pl_module.decoder.parameters()])

    def on_validation_batch_start(self, *_):
        self.validated = True

    def on_train_end(self, *_):
        self.ended = True


def make(poisoned, *callbacks, validate_every=None, **options):
    seed_everything(5)
    module = Poisoned(CONFIG, OptimizerConfig(lr=1e-2), ScheduleConfig(warmup_steps=1), **options)
    module.poisoned = poisoned
    trainer = Trainer(
        strategy=MHFSingleDevice("cpu"),
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=validate_every and 2 * validate_every,
        limit_val_batches=1 if validate_every else 0,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    return module, trainer


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:step")
def test_weights_and_optimiser_are_those_of_a_decision_on_the_host(monkeypatch):
    """The first step too, before which AdamW has no state, and the last one."""
    found = []
    for on_device in (True, False):
        with monkeypatch.context() as patch:
            if not on_device:
                patch.setattr(training, "leave_out_on_device", lambda *_: False)
            watch = Watch()
            module, trainer = make((0, 2, 3, 5), watch)
            trainer.fit(module, Data())
        found.append((module, trainer.optimizers[0].state_dict()["state"], watch))
    (ours, our_state, late), (theirs, their_state, at_once) = found
    assert all(same(a, b) for a, b in zip(late.weights, at_once.weights, strict=True))
    for a, b in zip(our_state.values(), their_state.values(), strict=True):
        assert same(a.values(), b.values())
        assert a["step"] == 2
    assert at_once.counted == late.logged == at_once.logged == [1, 1, 2, 3, 3, 4]
    assert late.counted == [0, 1, 1, 2, 3, 3]
    assert ours.skipped_steps == theirs.skipped_steps == 4
    assert ours._skipped_in_a_row == theirs._skipped_in_a_row == 1


def test_the_warning_names_its_step():
    module, trainer = make((1, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Data())
    said = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert [text.partition(": loss")[0] for text in said] == ["step 1", "step 2"]
    assert [text.partition("left out, ")[2] for text in said] == [f"{n} in a row of at most 3" for n in (1, 2)]
    assert all("gradient norm nan" in text for text in said)


@pytest.mark.filterwarnings("ignore:step")
def test_too_many_in_a_row_stop_before_the_next_update():
    watch = Watch()
    module, trainer = make((2, 3), watch, max_skipped_steps=1)
    with pytest.raises(NonFiniteError, match=r"^step 3: loss .* 2 in a row .* of the step: 12, 13, 14, 15\."):
        trainer.fit(module, Data())
    assert len(watch.counted) == 4  # the error came in the fifth
    assert same(module.decoder.parameters(), watch.weights[1])
    assert not same(watch.weights[1], watch.weights[0])
    assert module.skipped_steps == 2


def test_an_interrupted_fit_leaves_nothing_to_count_to_the_next():
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                raise RuntimeError("interrupted")

    module, trainer = make((1,), Interrupt(), max_skipped_steps=0)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(module, Data())
    module.poisoned = ()
    make(())[1].fit(module, Data())
    assert module.skipped_steps == 0


def test_the_last_step_may_be_one_too_many():
    watch = Watch()
    module, trainer = make((STEPS - 1,), watch, max_skipped_steps=0)
    with pytest.raises(NonFiniteError, match=f"^step {STEPS - 1}: "):
        trainer.fit(module, Data())
    assert not watch.ended


def test_no_validation_begins_after_one_too_many():
    watch = Watch()
    module, trainer = make((2,), watch, validate_every=3, max_skipped_steps=0)
    with pytest.raises(NonFiniteError, match=r"^step 2: "):
        trainer.fit(module, Data())
    assert len(watch.counted) == 3
    assert not watch.validated


@pytest.mark.filterwarnings("ignore:step")
def test_a_checkpoint_counts_its_last_step(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if not trainer.fit_loop._should_accumulate():
                trainer.save_checkpoint(tmp_path / f"step-{trainer.global_step}")

    module, trainer = make((0, 2, 3, 4), Save(), max_skipped_steps=2)
    with pytest.raises(NonFiniteError, match=r"^step 4: "):
        trainer.fit(module, Data())
    assert sorted(checkpoints(tmp_path)) == [1, 2, 3, 4]
    found = []
    for step in sorted(checkpoints(tmp_path)):
        module.on_load_checkpoint(trainer.strategy.load_checkpoint(tmp_path / f"step-{step}"))
        found.append((module.skipped_steps, module._skipped_in_a_row))
    assert found == [(1, 1), (1, 0), (2, 1), (3, 2)]
