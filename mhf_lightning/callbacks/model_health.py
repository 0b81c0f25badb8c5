"""Whether training goes well: gradient norms of parts of the model, sizes of updates, and loss spikes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhf_lightning.callbacks import is_logging_step, point_step, write_points
from mhf_lightning.callbacks.deferred import Deferring, HostCopy
from mhf_lightning.callbacks.gathering import RankTable
from mhf_lightning.training.gradients import ParameterGradients
from mhf_lightning.training.module import PretrainModule

SAMPLED_WEIGHTS = 2**18


@dataclass
class LossSpikes:
    """Compares each step's loss with an exponential average of those before it.

    A spike enters the average only up to the alarm's threshold, so that a second one is noticed too.

    Attributes:
        mean: Average of the losses, each step counting 1% more than the one before.
        variance: Average of their squared distances from it.
        steps: How many losses were seen.
    """

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0

    THRESHOLD = 6.0  # standard deviations
    WARM_UP = 50  # steps without an alarm
    LEAST_DEVIATION = 0.01  # nats; what is smaller than THRESHOLD times this is no spike

    def deviations(self, loss: float) -> float:
        """Return how many standard deviations a loss is above the average, and take it in; 0 while warming up."""
        deviation = max(math.sqrt(self.variance), self.LEAST_DEVIATION)
        above = (loss - self.mean) / deviation if self.steps >= self.WARM_UP else 0.0
        if above > self.THRESHOLD:
            loss = self.mean + self.THRESHOLD * deviation
        self.steps += 1
        share = max(1 / self.steps, 0.01)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)
        return above


@dataclass
class _LoggingStep:
    """A logging step of which the point is still to be written.

    Attributes:
        step: That of the point.
        lr: The learning rate; the schedule has changed the optimiser's own.
        norms: 1 where the step was left out, else 0; the norm before clipping over all tokens; those of the groups in
            the units of backward; on the device. None under DeepSpeed.
    """

    step: int
    lr: float
    norms: Tensor | None


class ModelHealth(Deferring):
    """Logs ``health/*``, and warns of a loss that is far above those before it.

    ``health/grad_norm/GROUP`` are the norms before clipping of the parts in :func:`groups`; their squares add up to
    that of ``train/grad_norm``. ``health/update_to_weight`` is the norm of AdamW's last update over that of the
    weights, from a sample of both. Neither exists under DeepSpeed, nor after a step that was left out.
    ``health/loss_spike`` is how many standard deviations the highest loss since the last logging step is above the
    average before it; its averages are in the checkpoint.

    Costs, at logging steps only: the norms of all gradients once more, queued behind the backward; a few kernels over
    ``SAMPLED_WEIGHTS`` elements, queued behind the next step's backward; and an exchange of two numbers on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spikes = LossSpikes()
        self._losses: list[tuple[int, Tensor]] = []  # step, and its loss on the device
        self._highest = 0.0  # deviation of the losses looked at since the last point
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._ranks: RankTable | None = None
        self._lr = 0.0
        self._norms: Tensor | None = None  # of the groups, at a logging step

    def on_fit_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Sort the parameters."""
        # Before the first forward: one without a backward, as in validation, leaves FSDP2's root with its gathered
        # parameters in place of the sharded ones, which alone have gradients.
        self._groups = groups(pl_module.decoder)
        self._ranks = RankTable()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: PretrainModule, optimizer: Any) -> None:  # type: ignore[override]
        """Take a turn; keep the learning rate, and at logging steps the norms, while there are gradients."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._lr = optimizer.param_groups[0]["lr"]
        self._norms = self._group_norms() if is_logging_step(trainer, ahead=1) else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: PretrainModule, *_: Any) -> None:  # type: ignore[override]
        """Keep the loss of a step; leave the point of a logging step."""
        if trainer.fit_loop._should_accumulate():
            return
        assert pl_module.step_loss is not None
        self._losses.append((trainer.global_step, pl_module.step_loss))
        if is_logging_step(trainer):
            norms, left_out, before = self._norms, pl_module.step_left_out, pl_module.step_grad_norm
            if norms is not None:
                assert left_out is not None
                assert before is not None
                norms = torch.cat((torch.stack((left_out, before)), norms))
            self.defer(partial(self._measure, trainer, _LoggingStep(point_step(trainer), self._lr, norms)))

    def state_dict(self) -> dict[str, Any]:
        """Write what is left, and return the averages up to now."""
        super().state_dict()
        self._look_for_spikes()
        return asdict(self.spikes)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from stored averages."""
        self.spikes = LossSpikes(**state_dict)

    def _group_norms(self) -> Tensor | None:
        """Return the norms of the groups' gradients, on the device; None where some have none, as under DeepSpeed."""
        parts = [ParameterGradients(group) for group in self._groups.values()]
        return torch.stack([part.norm() for part in parts]) if all(part.parameters for part in parts) else None

    def _measure(self, trainer: Trainer, of: _LoggingStep) -> None:
        """Queue what is measured after the step, and leave to the next turn what waits for it."""
        steps, losses = self._take_losses()
        known = [losses]
        if of.norms is not None:
            known.append(of.norms)
            optimizer = trainer.optimizers[0]
            if isinstance(optimizer, torch.optim.AdamW):
                known.append(squared_norms(optimizer, of.lr))
        self.defer(partial(self._write, trainer, of, steps, HostCopy(torch.cat(known))))

    def _write(self, trainer: Trainer, of: _LoggingStep, steps: list[int], measured: HostCopy) -> None:
        """Write the point of a logging step; a collective."""
        known = measured.read().tolist()
        losses, rest = known[: len(steps)], known[len(steps) :]
        self._take_in(steps, losses)
        values = {"health/loss_spike": self._highest}
        self._highest = 0.0
        if of.norms is not None and not rest[0]:  # not left out
            before, *rest = rest[1:]
            norms, squares = rest[: len(self._groups)], rest[len(self._groups) :]
            scale = before / (math.hypot(*norms) or 1.0)  # backward's units differ by one factor
            values |= {f"health/grad_norm/{name}": scale * n for name, n in zip(self._groups, norms, strict=True)}
            if squares:
                assert self._ranks is not None
                update, weight = self._ranks.sum(torch.tensor(squares, dtype=torch.float64)).sqrt().tolist()
                values["health/update_to_weight"] = update / weight
        write_points(trainer, values, of.step)

    def _take_losses(self) -> tuple[list[int], Tensor]:
        """Return and forget the steps since the last look, and their losses, on the device."""
        steps, losses = zip(*self._losses, strict=True)
        self._losses = []
        return list(steps), torch.stack(losses).double()

    def _look_for_spikes(self) -> None:
        """Take in the losses since the last look; a wait for the device."""
        if self._losses:
            steps, losses = self._take_losses()
            self._take_in(steps, losses.tolist())

    def _take_in(self, steps: list[int], losses: list[float]) -> None:
        """Warn of spikes, and remember how far the highest is above the average before it."""
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                continue  # the training module has left this step out, and said so
            average = self.spikes.mean
            above = self.spikes.deviations(loss)
            self._highest = max(self._highest, above)
            if above > LossSpikes.THRESHOLD:
                rank_zero_warn(
                    f"loss spike: {loss:.4f} at step {step} is {above:.1f} standard deviations above the average of "
                    f"{average:.4f}",
                    category=RuntimeWarning,
                )


def groups(decoder: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters of a decoder into embedding (with the head), attention, ffn, router and norms."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in decoder.named_parameters():
        found.setdefault(group_of(name), []).append(parameter)
    return found


def group_of(name: str) -> str:
    """Return the group of a decoder's parameter by its name."""
    parts = name.split(".")
    if parts[-1] == "router":
        return "router"
    if any(part.endswith("norm") for part in parts):
        return "norms"
    return next((part for part in ("attention", "ffn") if part in parts), "embedding")


@torch.no_grad()
def squared_norms(optimizer: torch.optim.AdamW, lr: float) -> Tensor:
    """Return this rank's share in the squared norms of AdamW's last update and of the weights, ``[2]`` float64.

    They are of a sample of elements, the same for both; the sums over ranks hold every element equally often.
    The update is worked out from the optimiser's state, so nothing has to be kept from before the step.

    Args:
        optimizer: After its step; its gradients may be gone.
        lr: The learning rate of the first group in that step; a schedule may have changed the optimiser's own by now.
    """
    total = sum(_local(p).numel() for group in optimizer.param_groups for p in group["params"])
    stride = -(-total // SAMPLED_WEIGHTS) | 1  # odd: a power of two would stay in few columns
    sums = torch.zeros(2, dtype=torch.float64, device=optimizer.param_groups[0]["params"][0].device)
    for group in optimizer.param_groups:
        by_shards: dict[int, list[Tensor]] = {}
        for p in group["params"]:
            if p in optimizer.state:  # it has been trained
                by_shards.setdefault(_shards(p), []).append(p)
        for shards, parameters in by_shards.items():
            of_group = lr * _peak_lr(group) / _peak_lr(optimizer.param_groups[0])  # one schedule for all
            sums += shards * _squared_norms([(p, optimizer.state[p]) for p in parameters], group, of_group, stride)
    return sums


def _peak_lr(group: dict[str, Any]) -> float:
    return group.get("initial_lr", group["lr"])  # a schedule adds the first


def _squared_norms(
    trained: list[tuple[Tensor, dict[str, Any]]], group: dict[str, Any], lr: float, stride: int
) -> Tensor:
    step = _local(torch.as_tensor(trained[0][1]["step"])).double()  # the fused AdamW has it on the device: not read
    weight = _sample([p for p, _ in trained], stride)
    mean, square = (_sample([state[key] for _, state in trained], stride) for key in ("exp_avg", "exp_avg_sq"))
    beta1, beta2 = group["betas"]
    direction = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
    before = (weight + lr * direction) / (1 - lr * group["weight_decay"])
    return torch.stack([(weight - before).square().sum(), weight.square().sum()])


def _shards(parameter: Tensor) -> int:
    """Return into how many parts a parameter is split; what is not split is on all ranks."""
    if not isinstance(parameter, DTensor):
        return 1
    split = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    return math.prod(parameter.device_mesh.size(dim) for dim in split)


def _sample(tensors: list[Tensor], stride: int) -> Tensor:
    """Return every ``stride``-th element of each tensor's local part, in float64."""
    return torch.cat([_local(t).reshape(-1)[::stride] for t in tensors]).double()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
