"""The public function `flash_mhf`, which checks its inputs and calls the op. May import torch and its siblings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mhf_kernels.ops import flash_mhf_op, flash_mhf_routed_op
from mhf_kernels.reference import AUTOCAST_DEVICES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flash_mhf(
    q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor | None = None, *, router: Tensor | None = None
) -> Tensor:
    """Compute `S_h = sum_e R_e * ((SiLU(Q_h K_e^T) * (Q_h U_e^T)) V_e)`, step 4 of FlashMHF (arXiv 2512.06989).

    Takes the gate R, or the router's weight, from which it computes R as `router_weights` does (step 3); on the gate's
    kernels without TF32, whatever `torch.set_float32_matmul_precision` says. Keeps nothing for the backward but its
    inputs; with `router`, R lives no longer than the call. Inputs may have any strides. Under `torch.autocast` (cpu,
    cuda), q, k, u, v are cast to the autocast dtype and r to float32; the router keeps its dtype. Gradients have their
    input's dtype; dR is summed in float32 (float64 for float64 inputs).

    Args:
        q: queries, `[B, L, H, d_h]`; float16, bfloat16, float32 or float64.
        k: gate weights, `[H_kuv, E, d_e, d_h]`, H a multiple of H_kuv; query head `h` uses head `h // (H / H_kuv)`.
        u: up weights, the shape of `k`.
        v: down weights, the shape of `k`. k, u, v have the dtype of `q`, except under autocast.
        r: gate of each sub-network, `[B, L, H, E]`; float32 (recommended) or the dtype of `q`. The kernels read it
            fastest with stride 1 along L, as `router_weights` lays it out.
        router: W, `[H, d_h, E]`, in place of `r`; any of these dtypes, float64 with a float64 `q` only.

    Returns:
        `[B, L, H, d_h]`, contiguous, in the dtype of `q` (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or not exactly one of `r` and `router` is given.
        BackendUnavailableError: `MHF_BACKEND` asks for kernels that are not available here (a ValueError).
        NotImplementedError: an input has a tangent of forward-mode differentiation, which the op would drop.
    """
    _check_shapes(q, k, u, v)
    if (r is None) == (router is None):
        raise ValueError("give either r, the gate, or router, the weight to compute it from")
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_tangents(q, k, u, v, r, router)
    if router is not None:
        _check_router(q, k, router)
        _check_devices_and_dtypes(q=q, k=k, u=u, v=v, router=router)
        return flash_mhf_routed_op(q, k, u, v, router)
    assert r is not None
    _check_gate(q, k, r)
    _check_devices_and_dtypes(q=q, k=k, u=u, v=v, r=r)
    return flash_mhf_op(q, k, u, v, r)


def _check_shapes(q: Tensor, k: Tensor, u: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q must be [B, L, H, d_h] and k [H_kuv, E, d_e, d_h]; got q {_shape(q)} and k {_shape(k)}")
    if u.shape != k.shape or v.shape != k.shape:
        raise ValueError(f"k, u and v must have one shape; got k {_shape(k)}, u {_shape(u)}, v {_shape(v)}")
    if min(k.shape) == 0:
        raise ValueError(f"k must have no dimension of size 0; got k {_shape(k)}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same d_h (last dimension); got q {_shape(q)} and k {_shape(k)}")
    if q.shape[2] == 0 or q.shape[2] % k.shape[0] != 0:
        raise ValueError(
            f"the heads of q (dimension 2) must be a multiple of the heads of k (dimension 0); "
            f"got q {_shape(q)} and k {_shape(k)}"
        )


def _refuse_tangents(*tensors: Tensor | None) -> None:
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("flash_mhf has no forward-mode derivative (jvp, jacfwd, linearize); use backward()")


def _check_gate(q: Tensor, k: Tensor, r: Tensor) -> None:
    if r.dim() != 4 or r.shape[:3] != q.shape[:3] or r.shape[3] != k.shape[1]:
        expected = [*q.shape[:3], k.shape[1]]
        raise ValueError(f"r must be [B, L, H, E] = {expected} to fit q {_shape(q)} and k {_shape(k)}; got {_shape(r)}")


def _check_router(q: Tensor, k: Tensor, router: Tensor) -> None:
    expected = [q.shape[2], q.shape[3], k.shape[1]]
    if _shape(router) != expected:
        raise ValueError(
            f"router must be [H, d_h, E] = {expected} to fit q {_shape(q)} and k {_shape(k)}; got {_shape(router)}"
        )


def _check_devices_and_dtypes(**tensors: Tensor) -> None:
    names = ", ".join(tensors)
    q = tensors["q"]
    if any(x.device != q.device for x in tensors.values()):
        given = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        raise ValueError(f"{names} must be on one device; got {given}; move them with .to(device)")

    given = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
    if any(x.dtype not in DTYPES for x in tensors.values()):
        raise ValueError(f"{names} must be of one of {DTYPES}; got {given}")
    device_type = q.device.type
    autocast = device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)
    if autocast and q.dtype != torch.float64:
        if any(x.dtype == torch.float64 for x in tensors.values()):
            raise ValueError(f"autocast does not cast float64: all of {names} must be float64 or none; got {given}")
        return
    if any(tensors[name].dtype != q.dtype for name in ("k", "u", "v")):
        how = ", as autocast does not cast float64" if autocast else ", or run under torch.autocast"
        raise ValueError(f"q, k, u and v must have one dtype; got {given}; cast them{how}")
    if "r" in tensors and tensors["r"].dtype not in (q.dtype, torch.float32):
        raise ValueError(f"r must have the dtype of q, or be torch.float32; got {given}; cast it")
    if "router" in tensors and tensors["router"].dtype == torch.float64 != q.dtype:
        raise ValueError(f"router can be float64 only where q is; got {given}; cast it")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
