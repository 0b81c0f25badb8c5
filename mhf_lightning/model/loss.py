"""The output head and the cross-entropy in one step, over chunks of tokens, so that logits are never whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
# Logits of a chunk: 128 MiB in 16 bits, fused; 384 in float32 and 16 bits otherwise. Smaller chunks mean more launches.
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
        targets: ``[T]``, int64, below 0 (such as ``IGNORE_INDEX``) where a token has no target.

    Raises:
        ValueError: There are not as many targets as tokens.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets are {list(targets.shape)} for hidden {list(hidden.shape)}; a target a token")
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
    nll, squared_log_z = _Sums.apply(hidden, weight, targets, dtype)
    return LossSums(nll, squared_log_z, (targets >= 0).sum())


class _Sums(torch.autograd.Function):
    """Products are in ``dtype``, everything else in float32 (float64 for float64), also under autocast."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        log_z = hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))
        picked = torch.empty_like(log_z)
        low = weight.detach().to(dtype)  # no parameter: torch.compile has a graph for each shape of those
        device = hidden.device.type
        for rows in _chunks(hidden, weight):
            log_z[rows], picked[rows] = fused(log_z_and_picked, device)(hidden[rows].detach(), low, targets[rows])
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.dtype = dtype
        valid = targets >= 0
        return torch.where(valid, log_z - picked, 0).sum(), torch.where(valid, log_z.square(), 0).sum()

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_squared_log_z: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With p = softmax(logits): the logits' gradient is ``(g + 2 g_z log Z) p``, less g at the target.

        Raises:
            RuntimeError: A second derivative is wanted; it would be wrong, as log(Z) is taken for a constant.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy_sums has no second derivative; leave create_graph out")
        hidden, weight, targets, log_z = ctx.saved_tensors
        valid = targets >= 0
        at_target = torch.where(valid, grad_nll, 0)
        share = torch.where(valid, grad_nll + 2 * grad_squared_log_z * log_z, 0)
        low = weight.detach().to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        for rows in _chunks(hidden, weight):
            numbers = log_z[rows], share[rows], at_target[rows], targets[rows]
            grad, grad_at_target = fused(logits_gradient, hidden.device.type)(hidden[rows].detach(), low, *numbers)
            grad.scatter_(1, _index(targets[rows]), grad_at_target)
            grad_hidden[rows] = grad @ low
            add_product(grad_weight, grad.T, hidden[rows].to(ctx.dtype))
            del grad  # before the next chunk's exists
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def log_z_and_picked(hidden: Tensor, low: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the softmax's sum and the target's logit for a chunk of tokens."""
    logits = _logits(hidden, low)
    picked = logits.gather(1, _index(targets)).squeeze(1)
    largest = logits.amax(-1)
    return largest + logits.sub_(largest[:, None]).exp_().sum(-1).log(), picked  # in place, unlike logsumexp


def logits_gradient(
    hidden: Tensor, low: Tensor, log_z: Tensor, share: Tensor, at_target: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a chunk's logits without its targets, and what it is at the targets, ``[chunk, 1]``.

    It is ``share * softmax``, less ``at_target`` at the target; both are rounded to the dtype of ``low`` last.
    """
    logits = _logits(hidden, low)
    picked = logits.gather(1, _index(targets))
    grad_at_target = (picked - log_z[:, None]).exp() * share[:, None] - at_target[:, None]
    grad = logits.sub_(log_z[:, None]).exp_().mul_(share[:, None])
    return grad.to(low.dtype), grad_at_target.to(low.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` in place to ``total``; where that is wider, on the CPU by way of the dtype of ``a``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def fused(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Return a function of a chunk as it runs on a device: on a GPU all but its product is one pass over the logits.

    Operation by operation, logits pass through memory a dozen times, in float32. A process that has used up the graphs
    which torch.compile allows a function (8, of shapes, dtypes and modes) goes on so; with ``fullgraph`` it would fail.
    """
    return torch.compile(function) if device_type == "cuda" else function


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Cut the tokens by a power of two: the chunks of most batches are then alike, and one graph serves all."""
    tokens = 1 << (max(1, CHUNK_LOGITS // len(weight)).bit_length() - 1)
    for start in range(0, len(hidden), tokens):
        yield slice(start, start + tokens)


def _logits(hidden: Tensor, low: Tensor) -> Tensor:
    """Return fresh logits ``[chunk, vocab_size]``, float32 or wider."""
    logits = hidden.to(low.dtype) @ low.T
    return logits.to(torch.promote_types(low.dtype, torch.float32))


def _index(targets: Tensor) -> Tensor:
    return targets.clamp_min(0)[:, None]
