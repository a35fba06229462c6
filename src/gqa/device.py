"""Where torch calculates: a device that is there, or an error."""

from __future__ import annotations

import torch

from gqa.errors import GqaError


def check_device(name: str) -> None:
    """Raise GqaError for a device that torch does not know, or does not have here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        got = f"{name}: {str(error).splitlines()[0]}"
        raise GqaError("no such device here", got=got, allowed=", ".join(here)) from None


def multiplies_bf16(name: str) -> bool:
    """Whether the device multiplies matrices of bf16 faster than those of fp32: a GPU that has it, or a CPU with
    instructions for it (AVX-512 BF16, AMX). Other CPUs emulate it."""
    if name != "cpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for these
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
