"""Feeds a prepared dataset to a Lightning Trainer, and continues where a checkpoint stopped."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from mhf_lightning.data.blocks import Item, PaddedBlocks, TokenBlocks
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import Manifest, verify
from mhf_lightning.data.sampler import GlobalOrderSampler, SequentialSampler
from mhf_lightning.signals import ignore_interrupts
from mhf_lightning.training.ranks import data_parallel_ranks


class TokenDataModule(LightningDataModule):
    """Batches of a prepared dataset: dicts of int64 tensors as in `TokenBlocks`, stacked to [micro_batch_size, ...].

    Training walks the global order of `GlobalOrderSampler` from `consumed_samples` on, for `trainer.max_steps`
    optimiser steps. Validation, test and predict walk the validation split in order, each block exactly once over all
    ranks; the last batches are filled with blocks whose labels are all -100 and whose sample_index is -1, so that ranks
    run the same number of equal batches.

    Nothing here draws from the global random state. Set `use_distributed_sampler=False` on the Trainer.

    Args:
        path: Folder made by `mhf data prepare`.
        micro_batch_size: Blocks per rank and forward pass.
        num_workers: Loader processes per rank; 0 loads in the training process.
        seed: Of the order of training samples.
        document_masking: Add `position_ids` and `document_ids`, and no label across the end of a document.
        verify_hashes: Hash every file of the dataset, once per node, before the first step.
        val_micro_batch_size: Blocks per rank and forward pass in validation (`micro_batch_size` unless given).

    Raises:
        DataError: A value is out of range, or, before the first step, the dataset is missing or damaged.
    """

    def __init__(
        self,
        path: str,
        micro_batch_size: int,
        num_workers: int = 0,
        seed: int = 1234,
        document_masking: bool = False,
        verify_hashes: bool = True,
        val_micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.path, self.micro_batch_size, self.num_workers, self.seed = path, micro_batch_size, num_workers, seed
        self.document_masking, self.verify_hashes = document_masking, verify_hashes
        self.val_micro_batch_size = micro_batch_size if val_micro_batch_size is None else val_micro_batch_size
        least = {
            "micro_batch_size": (micro_batch_size, 1),
            "val_micro_batch_size": (self.val_micro_batch_size, 1),
            "num_workers": (num_workers, 0),
            "seed": (seed, 0),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise DataError(f"data.{name} is {value}; it must be at least {minimum}.")
        self.consumed_samples = 0
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The dataset's manifest, read when first asked for."""
        if self._manifest is None:
            self._manifest = Manifest.load(self.path)
        return self._manifest

    def prepare_data(self) -> None:
        """Check the dataset's files; Lightning calls it on one process per node while the others wait."""
        if self.verify_hashes:
            verify(self.path)

    def train_dataloader(self) -> DataLoader[Item]:
        """The training batches of this rank, from `consumed_samples` on; its length is that of the whole run."""
        trainer = self.trainer
        assert trainer is not None
        if trainer.max_steps <= 0:
            raise ValueError(
                f"trainer.max_steps is {trainer.max_steps}: set trainer.max_steps to the number of optimiser steps. "
                "The order of samples, the schedule and resume are all counted in steps, not epochs."
            )
        rank, world_size = self._data_parallel()
        blocks = self._blocks("train")
        window = world_size * self.micro_batch_size
        self._say_passes(len(blocks), trainer.max_steps, trainer.accumulate_grad_batches * window)
        sampler = GlobalOrderSampler(
            num_samples_in_dataset=len(blocks),
            total_samples=trainer.max_steps * trainer.accumulate_grad_batches * window,
            seed=self.seed,
            start=self.consumed_samples,
            rank=rank,
            world_size=world_size,
            micro_batch_size=self.micro_batch_size,
        )
        return DataLoader(blocks, batch_sampler=sampler, **self._loader_options())

    def _say_passes(self, blocks: int, steps: int, global_batch: int) -> None:
        """Say how often the run goes over the data, where that is more than once."""
        passes = steps * global_batch / blocks
        run = f"{steps:,} steps of {global_batch:,} blocks"
        line = f"{run} are {passes:,.2f} passes over the {blocks:,} training blocks of {self.path}"
        if global_batch > blocks:
            rank_zero_warn(f"{line}: each step sees blocks more than once; use a smaller global batch, or more data")
        elif passes > 1:
            rank_zero_info(line)

    def val_dataloader(self) -> DataLoader[Item]:
        """The validation batches of this rank, all of one shape."""
        rank, world_size = self._data_parallel()
        blocks = self._blocks("validation")
        sampler = SequentialSampler(len(blocks), self.val_micro_batch_size, rank, world_size)
        return DataLoader(
            PaddedBlocks(blocks, sampler.padded_samples),
            sampler=sampler,
            batch_size=self.val_micro_batch_size,
            **self._loader_options(),
        )

    def test_dataloader(self) -> DataLoader[Item]:
        """The validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Item]:
        """The validation batches."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The data cursor: samples consumed over all ranks, and what order they are counted in; and whose tokens."""
        return {
            "consumed_samples": self.consumed_samples,
            "seed": self.seed,
            "global_batch": self._global_batch(),
            "dataset_id": self.manifest.dataset_id,
            "tokenizer_sha256": self.manifest.tokenizer.sha256,  # for those who use the model: checkpoint/trained.py
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint stopped.

        Raises:
            DataError: It was trained on another dataset, in the order of another seed, or with another global batch.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # validation and the like may look at any dataset
        if state_dict["dataset_id"] != self.manifest.dataset_id:
            raise DataError(
                f"the checkpoint was trained on another dataset than {self.path} (id {state_dict['dataset_id'][:12]}, "
                f"here {self.manifest.dataset_id[:12]}). Set data.path to that one, or start a new run."
            )
        if state_dict["seed"] != self.seed:
            raise DataError(
                f"the checkpoint's data order has seed {state_dict['seed']}, data.seed is {self.seed}. "
                f"Set data.seed to {state_dict['seed']}, or start a new run."
            )
        before, now = state_dict["global_batch"], self._global_batch()
        if before is not None and now is not None and math.prod(before) != math.prod(now):
            raise DataError(
                f"the checkpoint was trained with a global batch of {math.prod(before)} = micro_batch_size {before[0]} "
                f"x ranks {before[1]} x accumulate_grad_batches {before[2]}, here it is {math.prod(now)} = "
                f"{now[0]} x {now[1]} x {now[2]}. Change them so that the product is {math.prod(before)}."
            )
        self.consumed_samples = state_dict["consumed_samples"]

    def _global_batch(self) -> list[int] | None:
        """How a step's samples are dealt out: micro-batch size, ranks, accumulation. A resume keeps their product."""
        if self.trainer is None:
            return None
        return [self.micro_batch_size, self._data_parallel()[1], self.trainer.accumulate_grad_batches]

    def _blocks(self, split: str) -> TokenBlocks:
        # prepare_data has hashed the files where that was asked for.
        return TokenBlocks(self.path, split, verify_hashes=False, document_masking=self.document_masking)

    def _data_parallel(self) -> tuple[int, int]:
        assert self.trainer is not None
        return data_parallel_ranks(self.trainer)

    def _loader_options(self) -> dict[str, Any]:
        trainer = self.trainer
        assert trainer is not None
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": ignore_interrupts,
            "pin_memory": trainer.strategy.root_device.type == "cuda",
            # Each new iterator draws a number; from the global generator, that would move dropout.
            "generator": torch.Generator().manual_seed(self.seed),
        }
