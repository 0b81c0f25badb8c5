"""Whether FlashMHF's gates choose: statistics of a few tokens every few hundred steps, as curves and pictures.

The measures are pure functions of one layer's tensors; the callback gets those from a forward of its own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from mhf_kernels import FlashMHF
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhf_lightning.callbacks import is_logging_step, point_step, write_points
from mhf_lightning.callbacks.deferred import Deferring, HostCopy
from mhf_lightning.callbacks.gathering import RankTable
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.ranks import data_parallel_ranks

SAMPLED_TOKENS = 128
# A sub-network is dead where its mean gate is below this share of an equal one's.
DEAD_SHARE = 0.1
# A sigmoid is saturated outside of these: its slope is below a 25th of the largest.
SATURATED = (0.01, 0.99)


class GateHealth(NamedTuple):
    """What gates R do, for each head; E is the number of sub-networks. Of several layers each is ``[layers, H, ...]``.

    Attributes:
        entropy_token: ``[H]``, entropy of a token's gate over log E, mean over tokens: 1 is equal, 0 is one-hot.
        entropy_mean_gate: ``[H]``, entropy of the mean gate over log E. Where it equals ``entropy_token``, the gate
            does not depend on the token.
        effective_subnetworks: ``[H]``, mean of 1 / sum_e R_e^2, from 1 to E.
        dead_fraction: ``[H]``, share of sub-networks whose mean gate is below ``DEAD_SHARE / E``.
        sigmoid_sum: ``[H]``, mean of sum_e sigmoid(P_e), what R was divided by.
        saturation: ``[H]``, share of sigmoids outside of ``SATURATED``.
        load: ``[H, E]``, mean gate.
        contribution: ``[H, E]``, mean share of ``|R_e O_e|`` in its sum over sub-networks.
    """

    entropy_token: Tensor
    entropy_mean_gate: Tensor
    effective_subnetworks: Tensor
    dead_fraction: Tensor
    sigmoid_sum: Tensor
    saturation: Tensor
    load: Tensor
    contribution: Tensor


SCALARS = GateHealth._fields[:6]


def sigmoids_and_outputs(q: Tensor, router: Tensor, k: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's sigmoids before they are divided, and ``|O_e|``, both ``[T, H, E]`` in float32.

    As the layer computes them, also under autocast.

    Args:
        q: ``[T, H, d_h]``, normalised queries of some tokens.
        router: ``[H, d_h, E]``.
        k: ``[H_kuv, E, d_e, d_h]``, as u and v.
        u: Up weights.
        v: Down weights.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = q.float()
        return torch.einsum("thd,hde->the", q, router.float()).sigmoid(), output_norms(q, k, u, v)


def output_norms(q: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return ``|O_e|``, the norm of each sub-network's output: ``[T, H, E]`` for ``q [T, H, d_h]``."""
    heads = q.shape[1] // k.shape[0]
    k, u, v = (w.float().repeat_interleave(heads, dim=0) if heads > 1 else w.float() for w in (k, u, v))
    hidden = F.silu(torch.einsum("thd,hefd->thef", q, k)) * torch.einsum("thd,hefd->thef", q, u)
    return torch.einsum("thef,hefd->thed", hidden, v).norm(dim=-1)


def gate_health(sigmoid: Tensor, output: Tensor) -> GateHealth:
    """Measure gates by what :func:`sigmoids_and_outputs` returns: ``[..., T, H, E]``, also of layers at once."""
    total = sigmoid.sum(-1, keepdim=True)
    r = sigmoid / total.clamp_min(1e-20)
    load = r.mean(-3)
    low, high = SATURATED
    size = r * output  # |R_e O_e|
    return GateHealth(
        entropy_token=normalised_entropy(r).mean(-2),
        entropy_mean_gate=normalised_entropy(load),
        effective_subnetworks=r.square().sum(-1).reciprocal().mean(-2),
        dead_fraction=(load < DEAD_SHARE / load.shape[-1]).float().mean(-1),
        sigmoid_sum=total.mean((-3, -1)),
        saturation=((sigmoid < low) | (sigmoid > high)).float().mean((-3, -1)),
        load=load,
        contribution=(size / size.sum(-1, keepdim=True).clamp_min(1e-20)).mean(-3),
    )


def normalised_entropy(p: Tensor) -> Tensor:
    """Return the entropy over the last dimension, divided by that of equal shares; 1 where there is one share only."""
    if p.shape[-1] == 1:
        return torch.ones_like(p[..., 0])
    return torch.special.entr(p).sum(-1) / math.log(p.shape[-1])


class RouterHealth(Deferring):
    """Logs ``router/*`` of every FlashMHF layer and of their mean, and two pictures a layer (sub-network x head).

    It takes one sequence of each rank's current batch through the decoder once more, without gradients and uncompiled,
    and looks at ``SAMPLED_TOKENS`` of its tokens in each layer; values are means over the data-parallel ranks. All
    ranks take part, as the forward of a sharded model asks for. Layers with a softmax gate, which has no sigmoids, are
    passed over. DeepSpeed's ZeRO-3 records the order in which it gathers weights, which such a forward would upset:
    with it there is no look at the routers.

    Costs a forward of one sequence every ``every_n_steps``, for which the device waits: eager, it is bound by the host.
    Points and pictures are deferred; the pictures, which take the host longest, one layer a turn.
    """

    def __init__(self, every_n_steps: int) -> None:
        """Set up the callback.

        Args:
            every_n_steps: Optimiser steps between two looks, each at the next step at which Lightning logs; 0 for none.
        """
        super().__init__()
        self.every_n_steps = every_n_steps
        self._layers: dict[int, FlashMHF] = {}
        self._next = 0
        self._ranks: RankTable | None = None

    def on_train_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Find the layers."""
        ffns = {i: block.ffn for i, block in enumerate(pl_module.decoder.blocks)}
        self._layers = {i: ffn for i, ffn in ffns.items() if isinstance(ffn, FlashMHF) and ffn.gate == "sigmoid"}
        if not self.every_n_steps:
            self._layers = {}
        if self._layers and getattr(trainer.strategy, "zero_stage_3", False):
            rank_zero_info("router/*: n/a with DeepSpeed's ZeRO-3")
            self._layers = {}
        self._next = trainer.global_step + 1
        self._ranks = RankTable() if self._layers else None

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: PretrainModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Look, where it is time, and leave the rest."""
        if not self._layers or trainer.global_step < self._next or not is_logging_step(trainer):
            return
        self._next = trainer.global_step // self.every_n_steps * self.every_n_steps + self.every_n_steps
        health = self._measure(trainer, pl_module, batch)
        shapes = [value.shape for value in health]
        measured = HostCopy(torch.cat([value.flatten() for value in health]))
        self.defer(partial(self._write, trainer, measured, shapes, point_step(trainer)))

    def _write(self, trainer: Trainer, measured: HostCopy, shapes: list[torch.Size], step: int) -> None:
        """Write the points, and leave the pictures; a collective."""
        values = measured.read().split([shape.numel() for shape in shapes])
        health = GateHealth(*(value.view(shape) for value, shape in zip(values, shapes, strict=True)))
        by_layer = self._over_ranks(trainer, health)
        write_points(trainer, points(by_layer), step)
        self.defer(partial(self._draw, trainer, by_layer, step))

    def _draw(self, trainer: Trainer, health: dict[int, GateHealth], step: int) -> None:
        """Draw the first layer's pictures, and leave the others'."""
        layer = min(health)
        measured = health.pop(layer)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name in ("load", "contribution"):
                    picture = heat_map(getattr(measured, name).numpy().T)
                    logger.experiment.add_image(f"router/{name}/layer_{layer}", picture, step, dataformats="HWC")
        if health:
            self.defer(partial(self._draw, trainer, health, step))

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: PretrainModule, batch: dict[str, Tensor]) -> GateHealth:
        """Run one sequence through the decoder; the layers' inputs are caught on their way.

        Returns:
            What this rank measured in all layers, on the device.
        """
        sampled: dict[int, tuple[Tensor, Tensor]] = {}

        def look(layer: int, ffn: FlashMHF, x: Tensor) -> None:
            q = _local(ffn.queries(x))[0]  # [L, H, d_h]
            q = q[:: -(-len(q) // SAMPLED_TOKENS)]
            sampled[layer] = sigmoids_and_outputs(q, *(_local(w) for w in (ffn.router, ffn.k, ffn.u, ffn.v)))

        hooks = [
            # After the hook that splits heads, and inside of FSDP2's: the layer's input and weights are as in training.
            ffn.register_forward_pre_hook(lambda ffn, x, layer=layer: look(layer, ffn, x[0]))
            for layer, ffn in self._layers.items()
        ]
        one = {key: value[:1] for key, value in batch.items() if key in ("position_ids", "document_ids")}
        training = module.decoder.training
        module.decoder.eval()
        try:
            with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
                module.decoder(batch["input_ids"][:1], batch["labels"][:1], **one)
        finally:
            module.decoder.train(training)
            for hook in hooks:
                hook.remove()
        sigmoids, outputs = (torch.stack(parts) for parts in zip(*(sampled[i] for i in self._layers), strict=True))
        return gate_health(sigmoids, outputs)

    def _over_ranks(self, trainer: Trainer, health: GateHealth) -> dict[int, GateHealth]:
        """Put the heads of a split replica together, and take the mean over data-parallel ranks; a collective.

        Returns:
            The same by layer.
        """
        assert self._ranks is not None
        replicas = data_parallel_ranks(trainer)[1]
        split = trainer.world_size // replicas
        part = trainer.global_rank % split  # a replica's ranks are neighbours

        def placed(value: Tensor) -> Tensor:
            layers, heads, *rest = value.shape
            whole = torch.zeros(layers, heads * split, *rest, dtype=torch.float64)
            whole[:, part * heads : (part + 1) * heads] = value
            return whole

        wholes = [placed(value) for value in health]
        mean = self._ranks.sum(torch.cat([whole.flatten() for whole in wholes])) / replicas
        pieces = mean.split([whole.numel() for whole in wholes])
        means = [piece.view_as(whole) for piece, whole in zip(pieces, wholes, strict=True)]
        return {layer: GateHealth(*(mean[i] for mean in means)) for i, layer in enumerate(self._layers)}


def points(health: dict[int, GateHealth]) -> dict[str, float]:
    """Return the curves: each scalar's mean over heads, by layer and over layers."""
    values = {}
    for name in SCALARS:
        by_layer = {layer: float(getattr(measured, name).mean()) for layer, measured in health.items()}
        values[f"router/{name}/mean"] = sum(by_layer.values()) / len(by_layer)
        values |= {f"router/{name}/layer_{layer}": value for layer, value in by_layer.items()}
    return values


# Blue for less than an equal share, white for it, red for more (ColorBrewer's RdBu).
_COLOURS = np.array(
    [[5, 48, 97], [67, 147, 195], [209, 229, 240], [255, 255, 255], [253, 219, 199], [214, 96, 77], [103, 0, 31]],
    dtype=np.float64,
)
_OCTAVES = 3.0
_CELL = 16  # pixels


def heat_map(shares: np.ndarray) -> np.ndarray:
    """Draw shares ``[E, H]``, whose columns sum to 1, as an image ``[pixels, pixels, 3]`` of uint8.

    The colour of a cell is its share over an equal one, 1/E, on a fixed logarithmic scale from 1/8 to 8, so that
    pictures of different steps and layers can be compared; the column at the right is that scale, 8 at its top.
    """
    e = len(shares)
    octaves = np.log2(np.maximum(shares * e, 1e-9))
    cells = _colours(octaves).repeat(_CELL, axis=0).repeat(_CELL, axis=1)
    gap = np.full((e * _CELL, _CELL // 2, 3), 255, dtype=np.uint8)
    scale = _colours(np.linspace(_OCTAVES, -_OCTAVES, e * _CELL)[:, None]).repeat(_CELL, axis=1)
    return np.concatenate((cells, gap, scale), axis=1)


def _colours(octaves: np.ndarray) -> np.ndarray:
    """Return the colours ``[..., 3]`` of shares, given as powers of two of an equal one; white where one is NaN."""
    octaves = np.nan_to_num(octaves, nan=0.0)
    position = (np.clip(octaves, -_OCTAVES, _OCTAVES) / _OCTAVES + 1) / 2 * (len(_COLOURS) - 1)
    channels = [np.interp(position, np.arange(len(_COLOURS)), column) for column in _COLOURS.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
