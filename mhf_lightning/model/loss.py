"""The output head and the cross-entropy in one step, over chunks of tokens, so that logits are never whole."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024


class LossSums(NamedTuple):
    """Sums over the tokens of a batch that have a target: float32 scalars, and their number (int64 scalar)."""

    nll: Tensor
    squared_log_z: Tensor
    num_tokens: Tensor


def linear_cross_entropy_sums(hidden: Tensor, weight: Tensor, targets: Tensor) -> LossSums:
    """Sum the negative log-likelihood, and ``log(Z)^2`` for the z-loss, of ``hidden @ weight.T`` against targets.

    Each chunk of ``CHUNK_TOKENS`` tokens is checkpointed: its logits are freed after the forward and computed again
    in the backward, so at most one chunk of logits exists at any time. PyTorch's own chunked
    ``linear_cross_entropy`` gives no ``log(Z)`` and is absent before 2.13.

    Args:
        hidden: ``[T, d_model]``.
        weight: ``[vocab_size, d_model]``.
        targets: ``[T]``, int64, ``IGNORE_INDEX`` where a token has no target.
    """
    nll = hidden.new_zeros((), dtype=torch.float32)
    squared_log_z = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk_sums, h, weight, t, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_sums(h, weight, t)
        nll = nll + chunk[0]
        squared_log_z = squared_log_z + chunk[1]
    return LossSums(nll, squared_log_z, (targets != IGNORE_INDEX).sum())


def _chunk_sums(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float()  # [chunk, vocab_size]
    log_z = logits.logsumexp(-1)
    valid = targets != IGNORE_INDEX
    picked = logits.gather(-1, targets.clamp_min(0)[:, None]).squeeze(-1)
    zero = log_z.new_zeros(())
    return torch.where(valid, log_z - picked, zero).sum(), torch.where(valid, log_z.square(), zero).sum()
