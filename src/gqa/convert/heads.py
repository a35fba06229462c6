"""An attention layer seen head by head, in float64.

Letters: H KV heads · G queries per KV head · D head dim of q and k · R of them turned by the rotary embedding ·
Dv head dim of v · d hidden size · E = d, or d + 1 where the layer has biases: the bias is one more column, met by an
input that is always 1, so that whatever is done to the rows is done to the biases too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gqa.config import LayerShape
from gqa.weights.layout import AttentionWeights, Layout, Norm


@dataclass(frozen=True)
class Heads:
    """q (H, G, D, E), k (H, D, E), v (H, Dv, E), o (H, G, d, Dv); query head n = h * G + g reads KV head h.

    Rows of q and k lie in one order for all architectures: first the R that the rotary embedding turns, where row f
    makes a pair with row f + R/2, then those that it leaves alone. rotary is R; None stands for all of D.
    sinks (H, G): a logit per query head, beside those of the keys. norm says what stands between projections and
    rotary embedding, with its factors q_norm (H, G, D) and k_norm (H, D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    rotary: int | None = None
    sinks: Tensor | None = None
    norm: Norm | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def turned(self) -> int:
        """R, the rows of q and k that the rotary embedding turns."""
        return self.k.shape[1] if self.rotary is None else self.rotary

    def select(self, kv_heads: Sequence[int]) -> Heads:
        """The given KV heads with their query heads, in that order."""
        index = torch.as_tensor(kv_heads)
        return self._with({name: tensor[index] for name, tensor in self._tensors().items()})

    def shared(self, key: Tensor, value: Tensor) -> Heads:
        """One KV head, key (D, E) and value (Dv, E), read by all the query heads; k_norm is their mean."""
        own = {name: t.flatten(0, 1)[None] for name, t in self._tensors().items() if name not in ("k", "v", "k_norm")}
        norm = {} if self.k_norm is None else {"k_norm": self.k_norm.mean(0, keepdim=True)}
        return self._with({**own, "k": key[None], "v": value[None], **norm})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _with(self, tensors: dict[str, Tensor]) -> Heads:
        return dataclasses.replace(self, **tensors)  # type: ignore[arg-type]


def together(parts: Sequence[Heads]) -> Heads:
    """Several KV heads as one layer, in the order given."""
    names = parts[0]._tensors()
    return parts[0]._with({name: torch.cat([part._tensors()[name] for part in parts]) for name in names})


def split(weights: AttentionWeights, shape: LayerShape, layout: Layout) -> Heads:
    """Projection matrices, laid out (out, in) as in nn.Linear -> heads."""
    H, G = shape.kv_heads, shape.query_heads // shape.kv_heads
    D, Dv = shape.head_dim, shape.v_head_dim
    biases = (weights.q_bias, weights.k_bias, weights.v_bias)
    biased = any(bias is not None for bias in biases)
    order = _row_order(shape, layout)

    def rows(weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.double()
        if not biased:
            return weight
        column = weight.new_zeros(len(weight)) if bias is None else bias.double()
        return torch.cat([weight, column[:, None]], dim=1)

    def factors(norm: Tensor | None, *count: int) -> Tensor | None:
        if norm is None or layout.norm is None:
            return None
        norm = norm.double() + layout.norm.offset
        return (norm.expand(*count, D) if layout.norm.shared else norm.view(*count, D))[..., order]

    return Heads(
        q=rows(weights.q, weights.q_bias).view(H, G, D, -1)[:, :, order],
        k=rows(weights.k, weights.k_bias).view(H, D, -1)[:, order],
        v=rows(weights.v, weights.v_bias).view(H, Dv, -1),
        o=weights.o.double().view(-1, H, G, Dv).permute(1, 2, 0, 3),
        rotary=shape.rotary_dim,
        sinks=None if weights.sinks is None else weights.sinks.double().view(H, G),
        norm=None if weights.k_norm is None else layout.norm,
        q_norm=factors(weights.q_norm, H, G),
        k_norm=factors(weights.k_norm, H),
    )


def join(heads: Heads, like: AttentionWeights, shape: LayerShape, layout: Layout) -> AttentionWeights:
    """Heads -> projection matrices with the biases that `like` has; the output's bias is carried over."""
    hidden = like.q.shape[1]
    back = torch.argsort(_row_order(shape, layout))

    def weight(rows: Tensor) -> Tensor:
        return rows.reshape(-1, rows.shape[-1])[:, :hidden].contiguous()

    def bias(rows: Tensor, old: Tensor | None) -> Tensor | None:
        return None if old is None else rows.reshape(-1, rows.shape[-1])[:, hidden].contiguous()

    def stored(norm: Tensor | None, old: Tensor | None) -> Tensor | None:
        if norm is None or old is None or layout.norm is None or layout.norm.shared:
            return old
        flat = (norm - layout.norm.offset)[..., back].reshape(-1, norm.shape[-1])
        return (flat if old.ndim == 2 else flat.flatten()).contiguous()

    H, G, d, Dv = heads.o.shape
    q, k = heads.q[:, :, back], heads.k[:, back]
    return AttentionWeights(
        q=weight(q),
        k=weight(k),
        v=weight(heads.v),
        o=heads.o.permute(2, 0, 1, 3).reshape(d, H * G * Dv).contiguous(),
        q_bias=bias(q, like.q_bias),
        k_bias=bias(k, like.k_bias),
        v_bias=bias(heads.v, like.v_bias),
        o_bias=like.o_bias,
        q_norm=stored(heads.q_norm, like.q_norm),
        k_norm=stored(heads.k_norm, like.k_norm),
        sinks=None if heads.sinks is None else heads.sinks.flatten().contiguous(),
    )


def _row_order(shape: LayerShape, layout: Layout) -> Tensor:
    """For each row of a head in `Heads`, the row of the checkpoint that it comes from."""
    order = torch.arange(shape.head_dim)
    if layout.rotary == "interleaved":
        R = shape.head_dim if shape.rotary_dim is None else shape.rotary_dim
        order[:R] = torch.arange(R).view(-1, 2).T.flatten()
    return order


def to_pairs(rows: Tensor) -> Tensor:
    """Rows (..., R, E) -> complex rotary pairs (..., R/2, E) of the layout that pairs row f with row f + R/2.

    The rotary embedding multiplies pair f by exp(i * position * theta_f), so the maps of a head that commute with
    it, hence cost nothing at run time, are one complex factor per pair (source: Su et al. 2021, arXiv 2104.09864).
    """
    first, second = rows.chunk(2, dim=-2)
    return torch.complex(first, second)


def from_pairs(pairs: Tensor) -> Tensor:
    """Inverse of `to_pairs`."""
    return torch.cat([pairs.real, pairs.imag], dim=-2)
