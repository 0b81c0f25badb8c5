"""Token-weighted perplexity against a direct computation, over batches and two real processes."""

import math

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mhf_lightning.metrics import TokenPerplexity

BATCHES = [[(12.5, 5), (0.25, 1)], [(7.0, 2)]]  # of rank 0 and rank 1


def expected_loss() -> float:
    pairs = [pair for batches in BATCHES for pair in batches]
    return sum(nll for nll, _ in pairs) / sum(tokens for _, tokens in pairs)


def fill(metric: TokenPerplexity, batches: list[tuple[float, int]]) -> None:
    for nll, tokens in batches:
        metric.update(torch.tensor(nll), torch.tensor(tokens))


def test_one_process():
    metric = TokenPerplexity()
    for batches in BATCHES:
        fill(metric, batches)
    values = metric.compute()
    assert abs(values["loss"].item() - expected_loss()) < 1e-12
    assert abs(values["perplexity"].item() - math.exp(expected_loss())) < 1e-9
    assert values["loss"].dtype == torch.float64


def _rank(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    metric = TokenPerplexity()
    fill(metric, BATCHES[rank])
    assert abs(metric.compute()["loss"].item() - expected_loss()) < 1e-12
    dist.destroy_process_group()


def test_two_ranks_with_different_token_counts(tmp_path):
    mp.spawn(_rank, args=(f"file://{tmp_path}/rendezvous",), nprocs=2)
