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


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
