"""Token-weighted loss and perplexity, exact over batches and ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenPerplexity(Metric):
    """Mean negative log-likelihood per token and its exponential, from float64 sums.

    Ranks and batches may hold different numbers of tokens: the sums are added, and divided once.
    ``compute`` returns ``{"loss": nats per token, "perplexity": exp(loss)}``, NaN when no token was seen.
    """

    full_state_update = False
    nll: Tensor
    num_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, num_tokens: Tensor) -> None:
        """Add the summed negative log-likelihood (nats) of ``num_tokens`` tokens."""
        self.nll += nll.detach().double()
        self.num_tokens += num_tokens.double()

    def compute(self) -> dict[str, Tensor]:
        """Return loss and perplexity over everything seen on all ranks."""
        loss = self.nll / self.num_tokens
        return {"loss": loss, "perplexity": loss.exp()}
