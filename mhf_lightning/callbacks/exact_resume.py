"""What Lightning's checkpoints lack for an exact resume: the data cursor and every random number generator."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer


class ExactResume(Callback):
    """Counts consumed samples, and saves and restores the RNG state of every rank.

    The state is restored when training starts, after everything that draws random numbers on the way there. A rank
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
            datamodule.consumed_samples += len(batch["labels"]) * trainer.world_size

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put this rank's generators back where the checkpoint had them."""
        if self._restored is not None and trainer.global_rank < len(self._restored):
            set_rng_state(self._restored[trainer.global_rank])
        elif trainer.global_rank > 0:  # the weights are drawn by now; dropout must differ between ranks
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """Gather the RNG state of all ranks (a collective: every rank saves at the same step)."""
        states: list[Any] = [get_rng_state()]
        if dist.is_available() and dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, get_rng_state())
        return {"rng": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the stored states until training starts."""
        self._restored = state_dict["rng"]


def get_rng_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and PyTorch's generators as plain values and tensors."""
    version, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`get_rng_state` returned."""
    random.setstate(state["python"])
    version, keys, *rest = state["numpy"]
    np.random.set_state((version, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
