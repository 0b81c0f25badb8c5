"""Activation checkpointing of a block: what is kept for the backward, what is computed again. Torch and mhf_kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import mhf_kernels  # noqa: F401 - registers torch.ops.mhf
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["none", "selective", "ffn", "full"]

# FlashMHF's output is the input of W_out, whose backward wants it; the op's backward wants Q only, one matrix product
# away. Attention's backward wants its output too. Both are costly to compute again and no larger than a block's input.
# All else is computed again: norms, projections, rotary, a SwiGLU's intermediate. What each choice costs is measured:
# training/README.md.
FFN_OPS = (torch.ops.mhf.flash_mhf_routed.default, torch.ops.mhf.flash_mhf.default)
ATTENTION_OPS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
KEPT_OPS = {"selective": [*FFN_OPS, *ATTENTION_OPS], "ffn": [*FFN_OPS]}


def checkpointed(function: Callable[..., Any], mode: ActivationCheckpointing, *args: Any, dropout: bool) -> Any:
    """Call ``function(*args)`` so that its backward finds what ``mode`` keeps; in all but ``none`` and ``full``, once.

    Args:
        function: What to run; it may run again in the backward.
        mode: ``none`` keeps everything, ``full`` the arguments only, ``ffn`` also the output of FlashMHF's op,
            ``selective`` attention's output too.
        args: Arguments of the function.
        dropout: Whether the function draws random numbers, which must be the same the second time.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if mode in KEPT_OPS:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT_OPS[mode])
    return checkpoint(function, *args, **options)


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ValueError: The mode is not one of ``none``, ``selective``, ``ffn`` and ``full``.
    """
    if mode not in get_args(ActivationCheckpointing):
        raise ValueError(
            f"activation_checkpointing is {mode!r}; it must be one of {', '.join(get_args(ActivationCheckpointing))}"
        )
