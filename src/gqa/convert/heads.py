"""An attention layer seen head by head, in float64.

Letters: H KV heads · G queries per KV head · D head dim of q and k · Dv head dim of v · d hidden size ·
E = d, or d + 1 where the layer has biases: the bias is one more column, met by an input that is always 1, so that
whatever is done to the rows is done to the biases too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gqa.config import LayerShape
from gqa.weights.layout import AttentionWeights


@dataclass(frozen=True)
class Heads:
    """q (H, G, D, E), k (H, D, E), v (H, Dv, E), o (H, G, d, Dv); query head n = h * G + g reads KV head h."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    def select(self, kv_heads: Sequence[int]) -> Heads:
        """The given KV heads with their query heads, in that order."""
        index = torch.as_tensor(kv_heads)
        return Heads(self.q[index], self.k[index], self.v[index], self.o[index])


def split(weights: AttentionWeights, shape: LayerShape) -> Heads:
    """Projection matrices, laid out (out, in) as in nn.Linear -> heads."""
    H, G = shape.kv_heads, shape.query_heads // shape.kv_heads
    D, Dv = shape.head_dim, shape.v_head_dim
    biases = (weights.q_bias, weights.k_bias, weights.v_bias)
    biased = any(bias is not None for bias in biases)

    def rows(weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.double()
        if not biased:
            return weight
        column = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
        return torch.cat([weight, column[:, None]], dim=1)

    return Heads(
        q=rows(weights.q, weights.q_bias).view(H, G, D, -1),
        k=rows(weights.k, weights.k_bias).view(H, D, -1),
        v=rows(weights.v, weights.v_bias).view(H, Dv, -1),
        o=weights.o.double().view(-1, H, G, Dv).permute(1, 2, 0, 3),
    )


def join(heads: Heads, like: AttentionWeights) -> AttentionWeights:
    """Heads -> projection matrices with the biases that `like` has; the output's bias is carried over."""
    hidden = like.q.shape[1]

    def weight(rows: Tensor) -> Tensor:
        return rows.reshape(-1, rows.shape[-1])[:, :hidden].contiguous()

    def bias(rows: Tensor, old: Tensor | None) -> Tensor | None:
        return None if old is None else rows.reshape(-1, rows.shape[-1])[:, hidden].contiguous()

    H, G, d, Dv = heads.o.shape
    return AttentionWeights(
        q=weight(heads.q),
        k=weight(heads.k),
        v=weight(heads.v),
        o=heads.o.permute(2, 0, 1, 3).reshape(d, H * G * Dv).contiguous(),
        q_bias=bias(heads.q, like.q_bias),
        k_bias=bias(heads.k, like.k_bias),
        v_bias=bias(heads.v, like.v_bias),
        o_bias=like.o_bias,
    )


def to_pairs(rows: Tensor) -> Tensor:
    """Rows (..., D, E) -> complex rotary pairs (..., D/2, E) of the layout that pairs row f with row f + D/2.

    The rotary embedding multiplies pair f by exp(i * position * theta_f), so the maps of a head that commute with
    it, hence cost nothing at run time, are one complex factor per pair (source: Su et al. 2021, arXiv 2104.09864).
    """
    first, second = rows.chunk(2, dim=-2)
    return torch.complex(first, second)


def from_pairs(pairs: Tensor) -> Tensor:
    """Inverse of `to_pairs`."""
    return torch.cat([pairs.real, pairs.imag], dim=-2)
