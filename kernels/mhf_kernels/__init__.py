"""FlashMHF, usable without the rest of the project: the op, the layer, and its initialisation. Needs torch only."""

from mhf_kernels.api import flash_mhf
from mhf_kernels.initialization import InitGains
from mhf_kernels.layer import FlashMHF, HeadRMSNorm, router_weights

__all__ = ["FlashMHF", "HeadRMSNorm", "InitGains", "flash_mhf", "router_weights"]
