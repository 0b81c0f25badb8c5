"""The public functions: `flash_mhf`, which checks its inputs and calls the op, and `router_weights`."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from mhf_kernels.ops import flash_mhf_op

# Asking torch.amp.is_autocast_available instead would break the graph under torch.compile in torch 2.11.
AUTOCAST_DEVICES = ("cpu", "cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flash_mhf(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Compute `S_h = sum_e R_e * ((SiLU(Q_h K_e^T) * (Q_h U_e^T)) V_e)`, step 4 of FlashMHF (arXiv 2512.06989).

    Keeps nothing for the backward but its inputs. Inputs may have any strides. Under `torch.autocast` (cpu, cuda),
    q, k, u, v are cast to the autocast dtype and r to float32. Gradients have their input's dtype; dR is summed in
    float32 (float64 for float64 inputs).

    Args:
        q: queries, `[B, L, H, d_h]`; float16, bfloat16, float32 or float64.
        k: gate weights, `[H_kuv, E, d_e, d_h]`, H a multiple of H_kuv; query head `h` uses head `h // (H / H_kuv)`.
        u: up weights, the shape of `k`.
        v: down weights, the shape of `k`. k, u, v have the dtype of `q`, except under autocast.
        r: gate of each sub-network, `[B, L, H, E]`; float32 (recommended) or the dtype of `q`. The kernels read it
            fastest with stride 1 along L, as `router_weights` lays it out.

    Returns:
        `[B, L, H, d_h]`, contiguous, in the dtype of `q` (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        BackendUnavailableError: `MHF_BACKEND` asks for kernels that are not available here (a ValueError).
    """
    _check_shapes(q, k, u, v, r)
    _check_devices_and_dtypes(q, k, u, v, r)
    return flash_mhf_op(q, k, u, v, r)


def router_weights(q: Tensor, router: Tensor) -> Tensor:
    """Compute the gate `R = sigmoid(P) / sum_e sigmoid(P)`, `P = Q_h W^h`, step 3 of FlashMHF.

    Everything is float32, also under autocast (float64 for float64 inputs): Q and W^h are cast up before the product,
    which follows `torch.set_float32_matmul_precision` as every float32 product does. The sum is clamped to at least
    1e-20, as in the authors' code.

    Args:
        q: queries, `[B, L, H, d_h]`, any floating dtype.
        router: W, `[H, d_h, E]`, any floating dtype.

    Returns:
        `[B, L, H, E]`, float32, in memory `[H, E, B, L]`; each row sums to 1.
    """
    wide = torch.promote_types(torch.promote_types(q.dtype, router.dtype), torch.float32)
    with _autocast_disabled(q.device.type):
        # [H, E, B, L] in memory: the kernels read one sub-network's gates of many tokens at a time.
        p = torch.einsum("blhd,hde->hebl", q.to(wide), router.to(wide)).permute(2, 3, 0, 1)
        s = torch.sigmoid(p)
        return s / s.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def _autocast_disabled(device_type: str) -> contextlib.AbstractContextManager[object]:
    if device_type in AUTOCAST_DEVICES:  # not on the meta device
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _check_shapes(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> None:
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
    if r.dim() != 4 or r.shape[:3] != q.shape[:3] or r.shape[3] != k.shape[1]:
        expected = [*q.shape[:3], k.shape[1]]
        raise ValueError(f"r must be [B, L, H, E] = {expected} to fit q {_shape(q)} and k {_shape(k)}; got {_shape(r)}")


def _check_devices_and_dtypes(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> None:
    tensors = {"q": q, "k": k, "u": u, "v": v, "r": r}
    if any(x.device != q.device for x in tensors.values()):
        given = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        raise ValueError(f"q, k, u, v and r must be on one device; got {given}; move them with .to(device)")

    given = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
    if any(x.dtype not in DTYPES for x in tensors.values()):
        raise ValueError(f"q, k, u, v and r must be of one of {DTYPES}; got {given}")
    device_type = q.device.type
    autocast = device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)
    if autocast and q.dtype != torch.float64:
        if any(x.dtype == torch.float64 for x in tensors.values()):
            raise ValueError(f"autocast does not cast float64: all of q, k, u, v must be float64 or none; got {given}")
        return
    if any(x.dtype != q.dtype for x in (k, u, v)) or r.dtype not in (q.dtype, torch.float32):
        raise ValueError(
            f"q, k, u and v must have one dtype and r that dtype or torch.float32; got {given}; "
            "cast them, or run under torch.autocast"
        )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
