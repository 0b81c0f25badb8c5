"""The GPUs that `mhf plan` knows: memory and dense bfloat16 peak, from the vendor's data sheets. No imports."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """What a data sheet says of a GPU.

    Attributes:
        memory_gib: Memory; what the sheets call GB is GiB, less a little that error correction and driver take.
        bf16_flops: Peak FLOP/s of dense bfloat16 products with float32 sums. Sheets that give only the figure with
            structured sparsity are halved.
        large_workspace: Whether cuBLAS takes the workspace of Hopper and later GPUs (32 MiB instead of 8).
        source: The data sheet.
    """

    memory_gib: float
    bf16_flops: float
    large_workspace: bool
    source: str


_HALVED = "figure with sparsity, halved"

GPUS: dict[str, GPU] = {
    "a100-40gb": GPU(40, 312e12, False, "NVIDIA A100 Tensor Core GPU data sheet"),
    "a100": GPU(80, 312e12, False, "NVIDIA A100 Tensor Core GPU data sheet (80GB SXM)"),
    "h100": GPU(80, 989.5e12, True, f"NVIDIA H100 Tensor Core GPU data sheet (SXM; {_HALVED})"),
    "h100-pcie": GPU(80, 756.5e12, True, f"NVIDIA H100 Tensor Core GPU data sheet (PCIe; {_HALVED})"),
    "h100-nvl": GPU(94, 835.5e12, True, f"NVIDIA H100 Tensor Core GPU data sheet (NVL; {_HALVED})"),
    "h200": GPU(141, 989.5e12, True, f"NVIDIA H200 Tensor Core GPU data sheet (SXM; {_HALVED})"),
    "h200-nvl": GPU(141, 835.5e12, True, f"NVIDIA H200 Tensor Core GPU data sheet (NVL; {_HALVED})"),
    "gh200": GPU(96, 990e12, True, f"NVIDIA GH200 Grace Hopper Superchip data sheet (HBM3; {_HALVED})"),
    "b200": GPU(180, 2250e12, True, f"NVIDIA DGX B200 data sheet, an eighth ({_HALVED})"),
    "gb200": GPU(186, 2500e12, True, f"NVIDIA GB200 NVL72 data sheet, a 72nd ({_HALVED})"),
    "b300": GPU(262, 2250e12, True, f"NVIDIA HGX B300 data sheet, an eighth ({_HALVED})"),
    "l40s": GPU(48, 362.05e12, False, "NVIDIA L40S data sheet"),
    "l4": GPU(24, 121e12, False, f"NVIDIA L4 Tensor Core GPU data sheet ({_HALVED})"),
    "a10": GPU(24, 125e12, False, "NVIDIA A10 Tensor Core GPU data sheet"),
    "rtx-4090": GPU(24, 165.2e12, False, "NVIDIA Ada GPU Architecture white paper (float32 accumulation)"),
    "rtx-pro-6000": GPU(
        96, 503.8e12, False, "NVIDIA RTX Blackwell PRO GPU Architecture white paper (Workstation Edition)"
    ),
}


def find_gpu(name: str) -> GPU:
    """Return a GPU by its name.

    Raises:
        ValueError: The name is unknown; the message lists those that are known.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"--gpu is {name!r}; known are {', '.join(GPUS)} (mhf_lightning/plan/gpus.py has the table)")
    return GPUS[name.lower()]
