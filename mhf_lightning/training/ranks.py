"""Who reads which data: the data-parallel rank of a process, which is not its global rank where a model is split."""

from typing import Any

from lightning.pytorch import Trainer


def data_parallel_ranks(trainer: Trainer) -> tuple[int, int]:
    """Return ``(rank, size)`` among the processes that read different data.

    Tensor-parallel ranks of one replica read the same batches, so they share one data-parallel rank.
    """
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    if kwargs is not None:
        return kwargs["rank"], kwargs["num_replicas"]
    return trainer.global_rank, trainer.world_size


def data_parallel_group(trainer: Trainer) -> Any:
    """Return the process group of this process's data-parallel ranks; None means all processes."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    return None if mesh is None else mesh["data_parallel"].get_group()


def is_first_of_replica(trainer: Trainer) -> bool:
    """Return whether this is the first of the processes that share a data-parallel rank."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    return mesh is None or mesh["tensor_parallel"].get_local_rank() == 0
