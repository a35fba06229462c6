"""A KV cache in preallocated blocks, two per layer. A step writes its own tokens and copies nothing else."""

# B batch · H KV heads · S tokens held · T new tokens · D head dim of k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.cache.growing import GrowingCache, GrowingLayer


class ContiguousLayer(GrowingLayer):
    """Keys (B, H, capacity, D) and values (B, H, capacity, Dv) of one layer, growing as `GrowingLayer` says."""

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add k (B, H, T, D) and v (B, H, T, Dv); return them behind all that was held, (B, H, held + T, D or Dv).

        The results are views: later steps may move or overwrite them. With a window, the oldest are dropped only
        after this, since the new queries may see them. Raises GqaError when k and v do not go with what is held, or
        when autograd would need them.
        """
        self._check(k, v)
        keys, values = self._extend(k, v)
        return keys, values

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys (B, H, held, D) and values (B, H, held, Dv) held: views, valid until the next change."""
        keys, values = self.views()
        return keys, values


class ContiguousCache(GrowingCache[ContiguousLayer]):
    """A `ContiguousLayer` per layer: every number as it was given, H * (D + Dv) of them per token and layer."""

    layer_type = ContiguousLayer
