"""Work of a logging step that is done while the device has the next step's work queued."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Deferring(Callback):
    """Does what it leaves at ``on_train_batch_end`` in turns, which are taken when the device is busy.

    The host is ahead of the device by a step at most: before an update the training module waits until the device has
    come to the one before. At ``on_train_batch_end`` the device may have little left to do: always where the module has
    to wait for all of the backward (DeepSpeed), else where launches take the host as long as they take the device. A
    turn is therefore ``on_before_optimizer_step``, when a forward and a backward are queued behind that, and the host
    would only wait. What work defers itself comes a turn, a step, later. Turns are the same on all ranks, so work may
    be a collective. It may read from the device by a :class:`HostCopy` that began before this step only: the host then
    waits for the end of the step before, and the device has this forward and backward to do. Anything else waits for
    all that is queued.

    Nothing is left when a save asks for the state, when validation begins, and when training ends. After an exception
    what is left is dropped: a collective, or the device, might never answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deferred: deque[Callable[[], None]] = deque()

    def defer(self, work: Callable[[], None]) -> None:
        """Leave work to the next turn; it is done in the order in which it was left."""
        self._deferred.append(work)

    def finish_deferred(self) -> None:
        """Do all that is left now, also what it defers; a wait for the device."""
        while self._deferred:
            self._deferred.popleft()()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop what an interrupted run left."""
        self._deferred.clear()
        super().setup(trainer, pl_module, stage)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take a turn."""
        turn, self._deferred = self._deferred, deque()
        for work in turn:
            work()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish before validation has its points."""
        self.finish_deferred()
        super().on_validation_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self.finish_deferred()
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop what is left, also for a save that comes after."""
        self._deferred.clear()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """Finish: a save asks all callbacks for their state first, before ``on_save_checkpoint``."""
        self.finish_deferred()
        return {}


class HostCopy:
    """A copy of a tensor in host memory that begins now; reading it waits for what was queued before it only."""

    def __init__(self, tensor: Tensor) -> None:
        # From CUDA this is a copy into pinned memory, which the host does not wait for. A tensor that is on the CPU is
        # not copied; it must not be changed in place.
        self._values = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Return the tensor on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
