"""Where the Triton kernels run in these tests: on a GPU, or on the CPU, in Triton's interpreter."""

from typing import Any

import torch
from ops import bf16_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    bf16_interpreter.repair()


def there(q, k, v, options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The same call on DEVICE, its layouts kept."""
    q, k, v = (moved(x) for x in (q, k, v))
    return q, k, v, {name: moved(x) if torch.is_tensor(x) else x for name, x in options.items()}


def moved(x):
    if x.device.type == DEVICE:
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # pyright: ignore[reportArgumentType]
    return storage.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)
