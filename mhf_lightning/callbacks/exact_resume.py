"""What Lightning's checkpoints lack for an exact resume: data cursor, generators, progress in steps."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from mhf_lightning.training.ranks import data_parallel_ranks


class ExactResume(Callback):
    """Counts consumed samples, keeps the generators of every data-parallel rank, and converts Lightning's progress.

    Lightning counts micro-batches. A run that continues with another accumulation, at the same global batch, has done
    as many optimiser steps and another number of micro-batches.

    The RNG state is restored when training starts, after everything that draws random numbers on the way there. A rank
    that the checkpoint does not know (a larger world) is seeded by its number, as are the ranks of a new run.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, torch.Tensor], batch_idx: int
    ) -> None:
        """Advance the data cursor; runs before a checkpoint callback, which Lightning keeps last."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if hasattr(datamodule, "consumed_samples"):
            datamodule.consumed_samples += len(batch["labels"]) * data_parallel_ranks(trainer)[1]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put this rank's generators back where the checkpoint had them."""
        rank = data_parallel_ranks(trainer)[0]
        if self._restored is not None and rank < len(self._restored):
            set_rng_state(self._restored[rank])
        elif rank > 0:  # the weights are drawn by now; dropout must differ between ranks, not inside a split replica
            torch.manual_seed(torch.initial_seed() + rank)
        self._restored = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store what the micro-batches are counted in, and the RNG state of every data-parallel rank (a collective)."""
        checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches
        mine = (data_parallel_ranks(trainer)[0], get_rng_state())
        gathered: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, mine)
        by_rank = dict(gathered)  # the ranks of a split replica have the same
        checkpoint["rng"] = [by_rank[rank] for rank in sorted(by_rank)]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Convert the progress into micro-batches of this run, and keep the stored states until training starts."""
        self._restored = checkpoint["rng"]
        loops = checkpoint["loops"]["fit_loop"]
        reopen_progress(loops)
        progress = loops["epoch_loop.batch_progress"]
        for counters in (progress["current"], progress["total"]):
            convert_progress(counters, checkpoint["accumulate_grad_batches"], trainer.accumulate_grad_batches)


def reopen_progress(loops: dict[str, Any]) -> None:
    """Make the progress of a run that had ended that of a save in it, after the last micro-batch, in place.

    From a run that had ended, Lightning goes on in a second epoch, and may count a step that it does not make.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if batches["total"]["completed"] < batches["total"]["ready"]:
        return  # saved from on_train_batch_end
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for counters in (batches["current"], batches["total"]):
        counters["completed"] -= 1
    batches["is_last_batch"] = False
    for counters in (epochs["current"], epochs["total"]):
        counters["processed"] = counters["completed"] = counters["started"] - 1


def convert_progress(counters: dict[str, int], old: int, new: int) -> None:
    """Convert counters of micro-batches from ``old`` to ``new`` micro-batches an optimiser step, in place.

    Raises:
        ValueError: They were counted inside of a step.
    """
    ready = counters["ready"]
    if old == new:
        return
    if ready % old:
        raise ValueError(
            f"the checkpoint was saved after {ready} micro-batches, inside of an optimiser step of {old}: "
            f"trainer.accumulate_grad_batches must stay {old}"
        )
    for key in counters:  # a save from on_train_batch_end counts its micro-batch as ready, not yet as completed
        counters[key] += ready // old * new - ready


def get_rng_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and PyTorch's generators as plain values and tensors."""
    version, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`get_rng_state` returned."""
    random.setstate(state["python"])
    version, keys, *rest = state["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
