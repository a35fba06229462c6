"""A KV cache in int8 with a float32 scale per token and head, read by attention without ever being widened.

A row x of D numbers (one token, one head) is held as q = round(x / s), with s = max|x| / 127, and read as q * s.
Then |x - q * s| <= s / 2 for every number: at most 1/254 of the largest in its row. The quotient is rounded to
float32 first, which adds 127 * 2**-24 * s at most.
"""

# B batch · H KV heads · S tokens held · T new tokens · D head dim of k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.cache.check import check_floating
from gqa.cache.growing import GrowingCache, GrowingLayer
from gqa.cache.stored import Stored

_LARGEST = 127  # -128 stays unused, so that the range is symmetric
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., D), floating -> q (..., D) int8 and s (...) float32 with |x - q * s| <= s / 2.

    The scale is max|x| / 127, or the smallest normal float32 where that is less: zeros are zeros, never NaN. A row
    with a number that is NaN, infinite or beyond float32 gets a scale that is NaN or infinite, so that nothing finite
    is read in place of it; other rows do not notice.
    """
    largest = x.abs().amax(dim=-1).float()
    scale = (largest / _LARGEST).clamp_min_(_SMALLEST_SCALE)
    return (x / scale[..., None]).round_().to(torch.int8), scale


class Int8Layer(GrowingLayer):
    """int8 keys (B, H, capacity, D), values (B, H, capacity, Dv) and their scales (B, H, capacity) of one layer,
    growing as `GrowingLayer` says."""

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[Stored, Stored]:
        """Add k (B, H, T, D) and v (B, H, T, Dv), floating; return them behind all that was held, S = held + T.

        The results hold views: later steps may move or overwrite them. With a window, the oldest are dropped only
        after this, since the new queries may see them. Raises GqaError when k and v do not go with what is held, or
        when autograd would need them.
        """
        check_floating(k)
        self._check(k, v)
        return _pair(self._extend(*quantise(k), *quantise(v)))

    def stored(self) -> tuple[Stored, Stored]:
        """The keys and values held, S = held: views, valid until the next change."""
        return _pair(self.views())


class Int8Cache(GrowingCache[Int8Layer]):
    """An `Int8Layer` per layer: H * (D + Dv) + 2 * 4 * H bytes per token and layer."""

    layer_type = Int8Layer


def _pair(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> tuple[Stored, Stored]:
    k, k_scale, v, v_scale = tensors
    return Stored(k, k_scale), Stored(v, v_scale)
