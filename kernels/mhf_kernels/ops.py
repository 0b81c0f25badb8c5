"""The ops as PyTorch sees them: schema, fake, autograd, autocast, FLOPs. May import torch and the dispatcher.

`mhf::flash_mhf` and `mhf::flash_mhf_backward` are opaque to the compiler. The backward is an op of its own, so that
compiled and selectively checkpointed graphs can name it. `mhf::flash_mhf_routed` and its backward do the same with the
router's weight in place of R, which then lives no longer than a call. Shapes and dtypes are those of
`mhf_kernels.flash_mhf`.
"""

# No `from __future__ import annotations`: custom_op reads the schema from the annotations.
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mhf_kernels import dispatch


@torch.library.custom_op("mhf::flash_mhf", mutates_args=())
def flash_mhf_op(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Run the forward on the backend that the dispatcher picks."""
    return dispatch.select(q, k, u, v, r).forward(q, k, u, v, r)


@torch.library.custom_op("mhf::flash_mhf_backward", mutates_args=())
def flash_mhf_backward_op(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    need_q: bool,
    need_k: bool,
    need_u: bool,
    need_v: bool,
    need_r: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward; a gradient that is not needed comes back as an empty tensor of shape `[0]`.

    (A custom op returns tensors only, never None.)
    """
    needs_grad = (need_q, need_k, need_u, need_v, need_r)
    return _or_empty(dispatch.select(q, k, u, v, r).backward(grad_o, q, k, u, v, r, needs_grad), (q, k, u, v, r))


def _or_empty(grads: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> Any:
    """Return the gradients, with an empty tensor of its input's dtype in place of each None."""
    return tuple(x.new_empty(0) if grad is None else grad for grad, x in zip(grads, inputs, strict=True))


@torch.library.custom_op("mhf::flash_mhf_routed", mutates_args=())
def flash_mhf_routed_op(q: Tensor, k: Tensor, u: Tensor, v: Tensor, router: Tensor) -> Tensor:
    """Run the forward, with the gate inside the kernel where there is one for that."""
    return dispatch.routed_forward(q, k, u, v, router)


@torch.library.custom_op("mhf::flash_mhf_routed_backward", mutates_args=())
def flash_mhf_routed_backward_op(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    router: Tensor,
    need_q: bool,
    need_k: bool,
    need_u: bool,
    need_v: bool,
    need_router: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute R again, run the backward, and take dR back to the router's weight and to q."""
    gate = dispatch.select_router(q, router)
    r = gate.forward(q, router)
    needs_grad = (need_q, need_k, need_u, need_v, need_q or need_router)
    dq, dk, du, dv, dr = dispatch.select(q, k, u, v, r).backward(grad_o, q, k, u, v, r, needs_grad)
    d_router = None if dr is None else gate.backward(dr, q, router, dq)
    return _or_empty((dq, dk, du, dv, d_router if need_router else None), (q, k, u, v, router))


@flash_mhf_routed_op.register_fake
@flash_mhf_op.register_fake
def _(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@flash_mhf_backward_op.register_fake
def _(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    need_q: bool,
    need_k: bool,
    need_u: bool,
    need_v: bool,
    need_r: bool,
) -> tuple[Tensor, ...]:
    needs_grad = (need_q, need_k, need_u, need_v)
    inputs = (q, k, u, v)
    grads = [x.new_empty(x.shape if needed else 0) for x, needed in zip(inputs, needs_grad, strict=True)]
    return (*grads, torch.empty_like(r) if need_r else r.new_empty(0))


@flash_mhf_routed_backward_op.register_fake
def _(
    grad_o: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, router: Tensor, *needs_grad: bool
) -> tuple[Tensor, ...]:
    inputs = (q, k, u, v, router)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in zip(inputs, needs_grad, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)  # and nothing else: the scores are recomputed


def _autograd_of(backward: Any) -> Any:
    """Return the autograd formula that calls a backward op."""

    def formula(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad
        grads = backward(grad_o, *ctx.saved_tensors, *needs_grad)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))

    return formula


flash_mhf_op.register_autograd(_autograd_of(flash_mhf_backward_op), setup_context=_setup_context)
flash_mhf_routed_op.register_autograd(_autograd_of(flash_mhf_routed_backward_op), setup_context=_setup_context)


def _register_autocast(lib: torch.library.Library, device_type: str, dispatch_key: str) -> None:
    """Cast q, k, u, v to the autocast dtype and r to float32, in which the paper computes the gate; the router is left.

    `register_autocast` of a custom op would cast r as well. As in PyTorch's own rules, float64 is left alone; the
    casts are recorded by autograd, so each gradient arrives in its input's own dtype.
    """

    def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype)

    def autocast_kernel(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return flash_mhf_op(*(cast(x, dtype) for x in (q, k, u, v)), cast(r, torch.float32))

    def routed_autocast_kernel(q: Tensor, k: Tensor, u: Tensor, v: Tensor, router: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return flash_mhf_routed_op(*(cast(x, dtype) for x in (q, k, u, v)), router)

    lib.impl("flash_mhf", autocast_kernel, dispatch_key)
    lib.impl("flash_mhf_routed", routed_autocast_kernel, dispatch_key)


_lib = torch.library.Library("mhf", "FRAGMENT")  # registrations live as long as this object
_register_autocast(_lib, "cpu", "AutocastCPU")
_register_autocast(_lib, "cuda", "AutocastCUDA")


def _model_flops(q_shape: torch.Size, k_shape: torch.Size, routed: bool) -> int:
    """Three GEMMs over d_ff, `6 T H d_h d_ff`; with the router `2 T H d_h E` more."""
    _, subnetworks, d_e, _ = k_shape
    return (6 * d_e + 2 * routed) * math.prod(q_shape) * subnetworks


@register_flop_formula(torch.ops.mhf.flash_mhf)
def _forward_flops(q_shape: torch.Size, k_shape: torch.Size, *_: Any, **__: Any) -> int:
    return _model_flops(q_shape, k_shape, routed=False)


@register_flop_formula(torch.ops.mhf.flash_mhf_routed)
def _routed_forward_flops(q_shape: torch.Size, k_shape: torch.Size, *_: Any, **__: Any) -> int:
    return _model_flops(q_shape, k_shape, routed=True)


# Twice the forward, whatever the backend recomputes and whichever gradients are wanted: model FLOPs.


@register_flop_formula(torch.ops.mhf.flash_mhf_backward)
def _backward_flops(_grad_shape: torch.Size, q_shape: torch.Size, k_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _model_flops(q_shape, k_shape, routed=False)


@register_flop_formula(torch.ops.mhf.flash_mhf_routed_backward)
def _routed_backward_flops(
    _grad_shape: torch.Size, q_shape: torch.Size, k_shape: torch.Size, *_: Any, **__: Any
) -> int:
    return 2 * _model_flops(q_shape, k_shape, routed=True)
