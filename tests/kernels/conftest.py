from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from mhf_kernels import blocked
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _make_inputs(
    batch: int = 2,
    length: int = 5,
    heads: int = 4,
    d_h: int = 8,
    subnetworks: int = 3,
    d_e: int = 12,
    *,
    kuv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    r_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    requires_grad: bool = True,
) -> Inputs:
    """q, k, u, v, r with pre-activations of standard deviation `scale`, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    weights = (kuv_heads or heads, subnetworks, d_e, d_h)
    q = normal(batch, length, heads, d_h)
    k, u, v = normal(*weights, std=scale * d_h**-0.5), normal(*weights, std=scale * d_h**-0.5), normal(*weights)
    r = torch.rand((batch, length, heads, subnetworks), generator=generator, dtype=torch.float64)
    r = (r / r.sum(-1, keepdim=True)).to(r_dtype or dtype)
    return tuple(x.requires_grad_(requires_grad) for x in (q, k, u, v, r))  # type: ignore[return-value]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: with threads, each waits at a barrier, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Inputs]:
    return _make_inputs


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of d_ff and several chunks of tokens even for tiny shapes."""
    monkeypatch.setattr(blocked, "BLOCK_FF", 5)
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", {"cpu": 64})
