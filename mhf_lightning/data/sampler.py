"""In which order blocks are seen, and by which rank: pure functions of (seed, sample index)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mhf_lightning.data.errors import DataError


class GlobalOrderSampler(Sampler[list[int]]):
    """Batches of one rank from a global order of samples that no number of ranks can change.

    Global sample g (0, 1, ... total_samples - 1) is block `permutation(seed, g // N)[g % N]`, N being the blocks in the
    dataset: each pass over the dataset has a permutation of its own.

    Dealing: a micro step takes a window of world_size * micro_batch_size consecutive global samples, and rank r gets
    the slice [r * micro_batch_size, (r + 1) * micro_batch_size) of it. Optimiser step s with `a` accumulated micro
    steps thus consumes exactly the global samples [s * G, (s + 1) * G), G = a * world_size * micro_batch_size,
    whichever factors make up G.

    Use it as a DataLoader's `batch_sampler`. `len` counts the micro-batches of the whole run, those before `start`
    included, because Lightning counts the ones it has done; iteration begins at `start`.

    Args:
        num_samples_in_dataset: N.
        total_samples: Global samples in the whole run, a multiple of world_size * micro_batch_size.
        seed: Of the order; not negative.
        start: Global samples consumed before, a multiple of world_size * micro_batch_size.
        rank: Among those that read different data (data-parallel ranks).
        world_size: Number of data-parallel ranks.
        micro_batch_size: Blocks per rank and micro step.

    Raises:
        DataError: A value is out of its range.
    """

    def __init__(
        self,
        num_samples_in_dataset: int,
        total_samples: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        micro_batch_size: int,
    ) -> None:
        _check_rank(rank, world_size, micro_batch_size)
        window = world_size * micro_batch_size
        if num_samples_in_dataset < 1:
            raise DataError("the dataset has no blocks to sample from. Prepare a larger corpus.")
        if seed < 0:
            raise DataError(f"the seed of the data order is {seed}; it must not be negative.")
        for name, value in (("total_samples", total_samples), ("start", start)):
            if value < 0 or value % window:
                raise DataError(
                    f"{name} is {value}; it must be a multiple of {window} (world size {world_size} x micro_batch_size "
                    f"{micro_batch_size}). On a resume keep the global batch size: micro_batch_size x ranks x "
                    "accumulate_grad_batches."
                )
        if start > total_samples:
            raise DataError(
                f"{start} samples were consumed already, the run has only {total_samples}. Raise trainer.max_steps."
            )
        self.num_samples, self.total_samples, self.seed, self.start = num_samples_in_dataset, total_samples, seed, start
        self.rank, self.world_size, self.micro_batch_size = rank, world_size, micro_batch_size
        self._pass = -1
        self._permutation = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.total_samples // (self.world_size * self.micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        window = self.world_size * self.micro_batch_size
        for first in range(self.start + self.rank * self.micro_batch_size, self.total_samples, window):
            yield [self.block_of(sample) for sample in range(first, first + self.micro_batch_size)]

    def block_of(self, sample: int) -> int:
        """The block that is global sample `sample`."""
        number, position = divmod(sample, self.num_samples)
        if number != self._pass:
            self._pass, self._permutation = number, permutation(self.num_samples, self.seed, number)
        return int(self._permutation[position])


def permutation(length: int, seed: int, pass_number: int) -> np.ndarray:
    """The order of one pass: int64 [length].

    It sorts raw words of PCG64, whose stream NumPy promises to keep; that of `Generator.permutation` may change with a
    release, and a resumed run would silently read other data.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, pass_number])).random_raw(length)
    return np.argsort(words, kind="stable")


class SequentialSampler(Sampler[int]):
    """Every sample once over all ranks, in order; all ranks get the same number of full batches.

    Windows are dealt as in `GlobalOrderSampler`. Indices from `num_samples` on stand for padding; they occur in the
    last window only.
    """

    def __init__(self, num_samples: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check_rank(rank, world_size, micro_batch_size)
        self.rank, self.world_size, self.micro_batch_size = rank, world_size, micro_batch_size
        self.windows = -(-num_samples // (world_size * micro_batch_size))

    @property
    def padded_samples(self) -> int:
        """Samples over all ranks, with padding."""
        return self.windows * self.world_size * self.micro_batch_size

    def __len__(self) -> int:
        return self.windows * self.micro_batch_size

    def __iter__(self) -> Iterator[int]:
        for window in range(self.windows):
            first = (window * self.world_size + self.rank) * self.micro_batch_size
            yield from range(first, first + self.micro_batch_size)


def _check_rank(rank: int, world_size: int, micro_batch_size: int) -> None:
    if micro_batch_size < 1:
        raise DataError(f"micro_batch_size is {micro_batch_size}; it must be at least 1.")
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not one of {world_size} ranks.")
