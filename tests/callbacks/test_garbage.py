"""Python's garbage collector beside a training."""

import gc

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from mhf_lightning.callbacks.garbage import FrozenGarbage


class Look(Callback):
    """Counts what is frozen after each micro-batch, and fails on request."""

    def __init__(self, fail: bool) -> None:
        self.fail, self.frozen = fail, []

    def on_train_batch_end(self, *_):
        self.frozen.append(gc.get_freeze_count())
        if self.fail and len(self.frozen) == 5:
            raise RuntimeError("planted")


@pytest.mark.parametrize("fail", [False, True])
def test_what_lives_after_the_first_step_is_frozen_until_the_end(fail, tmp_path):
    look = Look(fail)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[FrozenGarbage(), look],
        enable_checkpointing=False,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert gc.get_freeze_count() == 0
    if fail:
        with pytest.raises(RuntimeError, match="planted"):
            trainer.fit(BoringModel())
    else:
        trainer.fit(BoringModel())
    assert look.frozen[0] == 0
    assert min(look.frozen[1:]) > 100_000
    assert gc.get_freeze_count() == 0
