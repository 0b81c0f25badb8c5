"""The output head and the cross-entropy in one step, over chunks of tokens, so that logits are never whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
# Logits of a chunk: in float32 and in 16 bits they take 384 MiB. Smaller chunks mean more launches for the same work.
CHUNK_LOGITS = 2**26


class LossSums(NamedTuple):
    """Sums over the tokens of a batch that have a target: float32 scalars, and their number (int64 scalar)."""

    nll: Tensor
    squared_log_z: Tensor
    num_tokens: Tensor


def linear_cross_entropy_sums(hidden: Tensor, weight: Tensor, targets: Tensor) -> LossSums:
    """Sum the negative log-likelihood, and ``log(Z)^2`` for the z-loss, of ``hidden @ weight.T`` against targets.

    Keeps ``log(Z)`` of every token for the backward, which computes the logits again, chunk by chunk: at most one chunk
    exists at any time. PyTorch's own chunked ``linear_cross_entropy`` gives no ``log(Z)`` and is absent before 2.13.

    Args:
        hidden: ``[T, d_model]``.
        weight: ``[vocab_size, d_model]``.
        targets: ``[T]``, int64, ``IGNORE_INDEX`` where a token has no target.
    """
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
    nll, squared_log_z = _Sums.apply(hidden, weight, targets, dtype)
    return LossSums(nll, squared_log_z, (targets != IGNORE_INDEX).sum())


class _Sums(torch.autograd.Function):
    """Products are in ``dtype``, everything else in float32 (float64 for float64), also under autocast."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        log_z = hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))
        picked = torch.empty_like(log_z)
        low = weight.to(dtype)
        for rows in _chunks(hidden, weight):
            logits = _logits(hidden[rows], low)
            picked[rows] = logits.gather(1, _index(targets[rows])).squeeze(1)
            largest = logits.amax(-1)
            log_z[rows] = largest + logits.sub_(largest[:, None]).exp_().sum(-1).log()  # in place, unlike logsumexp
            del logits  # before the next chunk's exist
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.dtype = dtype
        valid = targets != IGNORE_INDEX
        return torch.where(valid, log_z - picked, 0).sum(), torch.where(valid, log_z.square(), 0).sum()

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_squared_log_z: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With p = softmax(logits): the logits' gradient is ``(g + 2 g_z log Z) p``, less g at the target."""
        hidden, weight, targets, log_z = ctx.saved_tensors
        valid = targets != IGNORE_INDEX
        at_target = torch.where(valid, grad_nll, 0)[:, None]
        share = torch.where(valid, grad_nll + 2 * grad_squared_log_z * log_z, 0)[:, None]
        low = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        for rows in _chunks(hidden, weight):
            grad = _logits(hidden[rows], low).sub_(log_z[rows, None]).exp_().mul_(share[rows])
            index = _index(targets[rows])
            grad.scatter_(1, index, grad.gather(1, index) - at_target[rows])
            grad = grad.to(ctx.dtype)
            grad_hidden[rows] = grad @ low
            grad_weight += grad.T @ hidden[rows].to(ctx.dtype)
            del grad
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    tokens = max(1, CHUNK_LOGITS // len(weight))
    for start in range(0, len(hidden), tokens):
        yield slice(start, start + tokens)


def _logits(hidden: Tensor, low: Tensor) -> Tensor:
    """Return fresh logits ``[chunk, vocab_size]``, float32 or wider."""
    logits = hidden.to(low.dtype) @ low.T
    return logits.to(torch.promote_types(low.dtype, torch.float32))


def _index(targets: Tensor) -> Tensor:
    return targets.clamp_min(0)[:, None]
