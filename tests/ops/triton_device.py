"""Where the Triton kernels run in these tests, and what they can be asked for there."""

from typing import Any

import torch
from ops.every_call import FLOATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies matrices of bf16 wrongly.
DTYPES = {name: dtype for name, dtype in FLOATS.items() if DEVICE == "cuda" or name != "bf16"}


def there(q, k, v, options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The same call on DEVICE, its layouts kept."""
    q, k, v = (moved(x) for x in (q, k, v))
    return q, k, v, {name: moved(x) if torch.is_tensor(x) else x for name, x in options.items()}


def moved(x):
    if x.device.type == DEVICE:
        return x
    storage = torch.empty(0, dtype=x.dtype, device=DEVICE).set_(x.untyped_storage().to(DEVICE))  # pyright: ignore
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)
