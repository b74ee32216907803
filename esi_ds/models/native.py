"""Which types this machine computes without emulating them."""

from __future__ import annotations

import os

import torch

# Names of torch.cpu.get_capabilities, each of which is enough: x86's, then ARM's.
CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def computes_bf16() -> bool:
    """Whether the current GPU, or the CPU where there is none or DS_ACCELERATOR is cpu, multiplies bf16 natively.

    GPUs do from compute capability 8.0 (Ampere); before, and on CPUs without the instructions, bf16 is emulated.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))  # type: ignore[no-untyped-call]  # of PyTorch
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(flag, False) for flag in CPU_FLAGS)
