"""Activation checkpointing of a block: what is kept for the backward, what is computed again. Torch and mhf_kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import mhf_kernels  # noqa: F401 - registers torch.ops.mhf
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["none", "full", "selective"]

# What `selective` keeps: the outputs of attention and of FlashMHF's op. Both are costly to compute again and no larger
# than the block's input. FlashMHF's output is the input of W_out, whose backward wants it; the op's backward wants Q
# only, one matrix product away. All else is computed again: norms, projections, rotary, a SwiGLU's intermediate.
# On an H100 (docs/measured: training-370m.csv) a step of FlashMHF takes 313 ms and 21.8 GiB with `none`, 362 ms
# and 8.6 GiB with `full`, 327 ms and 11.2 GiB with `selective`: the two tensors of a block, 2.6 GiB of 20 blocks, buy
# back 35 of 50 ms.
KEPT_OPS = (
    torch.ops.mhf.flash_mhf_routed.default,
    torch.ops.mhf.flash_mhf.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def checkpointed(function: Callable[..., Any], mode: ActivationCheckpointing, *args: Any, dropout: bool) -> Any:
    """Call ``function(*args)`` so that its backward finds what ``mode`` keeps.

    Args:
        function: What to run; it may run again in the backward.
        mode: ``none`` keeps everything, ``full`` the arguments only, ``selective`` also the outputs of ``KEPT_OPS``.
        args: Arguments of the function.
        dropout: Whether the function draws random numbers, which must be the same the second time.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(KEPT_OPS))
    return checkpoint(function, *args, **options)


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ValueError: The mode is not one of ``none``, ``full`` and ``selective``.
    """
    if mode not in get_args(ActivationCheckpointing):
        raise ValueError(
            f"activation_checkpointing is {mode!r}; it must be one of {', '.join(get_args(ActivationCheckpointing))}"
        )
