"""Where attention is timed: the CPU, or a GPU through CUDA."""

from __future__ import annotations

import torch

from gqa.bench.gpu import GpuLimits, measure_gpu
from gqa.bench.machine import Limits, measure_limits
from gqa.errors import GqaError

DEVICES = ("cpu", "cuda")


def choose_device(device: str | None = None) -> str:
    """`device`, or without one cuda where torch finds a GPU, else cpu. Raises GqaError where there is no such."""
    present = torch.cuda.is_available()
    if device is None:
        return "cuda" if present else "cpu"
    if device not in DEVICES:
        raise GqaError("an unknown device", got=device, allowed=", ".join(DEVICES))
    if device == "cuda" and not present:
        raise GqaError(
            "device cuda is not available",
            got=f"torch {torch.__version__} finds no GPU",
            allowed="cpu",
            hint="nvidia-smi lists the GPUs; torch must be built with CUDA",
        )
    return device


def measure_device(device: str) -> Limits | GpuLimits:
    """The limits of one of DEVICES, measured now."""
    return measure_gpu() if device == "cuda" else measure_limits()
