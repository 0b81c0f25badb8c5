"""Run every kernel once on small inputs, for compute-sanitizer (`tests/gpu/run.sh OUT sanitize`); on Hopper.

Arguments: names of backends, both unless given.

Checks the values too, loosely: a tool that changes the timing should not change them.
"""

from __future__ import annotations

import os
import sys

import torch
from mhf_kernels import flash_mhf, flash_mhf_reference, router_weights

# backend, then batch, length, heads, E, d_e, d_h; gluon needs enough tiles, heads and sub-networks for the GPU
CASES = [
    *(("gluon", (1, 1100, 16, 2, 128, d_h)) for d_h in (64, 128, 256)),
    ("gluon", (1, 1100, 16, 5, 128, 128)),  # dK, dU, dV: a whole wave, and a shared rest
    *(("triton", (2, 131, 2, 2, 80, d_h)) for d_h in (64, 96)),
    ("triton", (1, 16, 2, 2, 64, 128)),
]


def run(backend: str, shape: tuple[int, ...]) -> None:
    """Forward and backward with the router, against float64."""
    batch, length, heads, subnetworks, d_e, d_h = shape
    q = torch.randn(batch, length, heads, d_h, device="cuda")
    k, u, v = (0.1 * torch.randn(heads, subnetworks, d_e, d_h, device="cuda") for _ in range(3))
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, u, v)]
    inputs.append((0.1 * torch.randn(heads, d_h, subnetworks, device="cuda")).requires_grad_())
    os.environ["MHF_BACKEND"] = backend
    o = flash_mhf(*inputs[:4], router=inputs[4])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = flash_mhf_reference(*wide[:4], router_weights(wide[0], wide[4]))
    grad = torch.randn_like(o)
    found = [o, *torch.autograd.grad(o, inputs, grad)]
    expected = [truth, *torch.autograd.grad(truth, wide, grad.double())]
    for name, a, b in zip(("o", "dq", "dk", "du", "dv", "dw"), found, expected, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm(), (backend, shape, name)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["gluon", "triton"]
    assert {"gluon", "triton"} >= set(wanted), wanted
    for backend, shape in CASES:
        if backend not in wanted:
            continue
        run(backend, shape)
        print(backend, shape, "right", flush=True)
