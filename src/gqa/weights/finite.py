"""Whether all of a tensor's values are finite, at the speed of reading it."""

from __future__ import annotations

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity. Both show in the extremes, which are found without a temporary of the tensor's size."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
