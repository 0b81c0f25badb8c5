"""Which process is the first, and who reads which data: by data-parallel rank, not the global one in a split model."""

import os
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor


def is_first_process() -> bool:
    """Return whether this will be global rank 0, by the environment, before there is a trainer.

    Lightning starts the others of one machine by the same command with a LOCAL_RANK; NODE_RANK, set by hand, tells
    machines apart.
    """
    keys = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return all(os.environ.get(key, "0") == "0" for key in (("RANK",) if "RANK" in os.environ else keys))


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


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """Add a tensor up in place over the ranks of a group, by default all, and return it; on a GPU it is only queued.

    Lightning's ``strategy.reduce`` begins with a barrier, in which the host waits for the device.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, group=group)
    return tensor


def is_first_of_replica(trainer: Trainer) -> bool:
    """Return whether this is the first of the processes that share a data-parallel rank."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    return mesh is None or mesh["tensor_parallel"].get_local_rank() == 0
