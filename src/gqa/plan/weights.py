"""How many bytes the weights take at a setting of the dial."""

from __future__ import annotations

import dataclasses

from gqa.config import ModelShape
from gqa.plan.parameters import kv_projection_parameters, total_parameters


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint's headers say: bytes of all tensors, and of those of the K and V projections."""

    total_bytes: int
    kv_bytes: float


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of `shape`, the model as it is: `stored` where its size is known, else `element_bytes` for each
    parameter; None for what is not known."""

    shape: ModelShape
    element_bytes: int | None
    stored: Stored | None = None

    def bytes_of(self, shape: ModelShape) -> float | None:
        """At another setting: what is stored, with the K and V projections in proportion to their KV heads."""
        if self.stored is not None:
            return self.stored.total_bytes + self.stored.kv_bytes * (_kv_width(shape) / _kv_width(self.shape) - 1)
        parameters = total_parameters(shape)
        return None if parameters is None or self.element_bytes is None else parameters * self.element_bytes

    @property
    def bytes_per_parameter(self) -> float | None:
        """On average, where sizes are stored."""
        parameters = total_parameters(self.shape)
        if self.stored is not None:
            return None if parameters is None else self.stored.total_bytes / parameters
        return self.element_bytes

    def of_rank(self, shape: ModelShape, ranks: int) -> float | None:
        """On one of `ranks` devices: a share, and whole copies of the KV heads where there are fewer than devices."""
        whole = self.bytes_of(shape)
        if whole is None or ranks == 1 or shape.is_latent or not shape.attention:
            return None if whole is None else whole / ranks
        copies = max(max(1, layer.kv_heads // ranks) * ranks / layer.kv_heads for layer in shape.attention)
        kv = self._kv_bytes(shape) or 0
        return (whole + (copies - 1) * kv) / ranks

    def _kv_bytes(self, shape: ModelShape) -> float | None:
        if self.stored is not None:
            return self.stored.kv_bytes * _kv_width(shape) / _kv_width(self.shape)
        parameters = kv_projection_parameters(shape)
        return None if parameters is None or self.element_bytes is None else parameters * self.element_bytes


def _kv_width(shape: ModelShape) -> int:
    """Rows of all K and V projections; 1 where there are none, so that nothing changes with them."""
    return sum(layer.kv_heads * (layer.head_dim + layer.v_head_dim) for layer in shape.attention) or 1
