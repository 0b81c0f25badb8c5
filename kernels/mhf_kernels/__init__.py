"""FlashMHF (arXiv 2512.06989): the op `flash_mhf` and the layer `FlashMHF`. Imports torch, and nothing else."""

from mhf_kernels import sharding
from mhf_kernels.dispatch import BackendUnavailableError
from mhf_kernels.functional import flash_mhf
from mhf_kernels.initialization import InitGains
from mhf_kernels.layer import FlashMHF, HeadRMSNorm
from mhf_kernels.reference import flash_mhf_reference, router_weights
from mhf_kernels.replace import replace_ffn

sharding.register()  # the ops exist by now

__all__ = [
    "BackendUnavailableError",
    "FlashMHF",
    "HeadRMSNorm",
    "InitGains",
    "flash_mhf",
    "flash_mhf_reference",
    "replace_ffn",
    "router_weights",
]
