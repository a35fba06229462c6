"""Merge the KV heads of a group into one; a function per method.

Each takes the `Heads` of one group (r KV heads, each read by G query heads) and returns the `Heads` of the merged
one: H = 1 KV head read by r * G query heads. What a head loses by sharing is made up as far as possible by its own
change of basis, absorbed into W_q and W_o, which costs nothing at run time.

Letters: r KV heads of the group · G · D · Dv · E inputs (with bias column) · d hidden.
C (E, E) is the second moment E[x xT] of the attention's input, the identity where no calibration text is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from gqa.convert.heads import Heads
from gqa.convert.keys import procrustes_keys, svd_keys, times, turn_onto_mean


def mean(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """K and V are the mean over the group. Source: Ainslie et al. 2023, arXiv 2305.13245."""
    return group.shared(group.k.mean(0), group.v.mean(0))


def first(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """K and V of the group's first head serve all. Source: Ainslie et al. 2023, arXiv 2305.13245."""
    return _with_factors(group.shared(group.k[0], group.v[0]), None if group.k_norm is None else group.k_norm[0])


def random(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """K and V drawn afresh, with the parent's standard deviation. Source: Ainslie et al. 2023, arXiv 2305.13245."""

    def draw(rows: Tensor) -> Tensor:
        return torch.randn(rows.shape[1:], generator=generator, dtype=rows.dtype).to(rows.device) * rows.std()

    return group.shared(draw(group.k), draw(group.v))


def procrustes(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """Turn every head onto the group's mean, then pool: V by any orthogonal map, absorbed into W_o; K by a phase per
    rotary pair and an orthogonal map of the rows without rotary, absorbed into W_q.

    Source: Jin et al. 2024, arXiv 2412.20677; the phases are what commutes with the rotary embedding.
    """
    turns, value = turn_onto_mean(group.v, moment)
    group, key, factors = procrustes_keys(group, moment)
    turned = dataclasses.replace(group, o=group.o @ turns.mT[:, None])
    return _with_factors(turned.shared(key, value), factors)


def svd(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """The best shared subspace in closed form; the keys' part is told in `svd_keys`.

    V/O: with the stacked W_o of head i factored as Q_i R_i, head i contributes Q_i (R_i W_v,i) x. The Dv directions
    that keep most of the energy of all R_i W_v,i x are the top eigenvectors U of their joint second moment
    B C BT (r*Dv, r*Dv); the shared W_v is UT B and head i's W_o is Q_i U_i.

    Working with U rather than with normalised right singular vectors needs no inverse of C, so that few calibration
    tokens (a singular C) and exactly equal heads (a rank of Dv) are no special cases. A scale per group keeps the
    size of the parent's K and V. Source: ours; the V/O half goes back to Yu et al. 2024, arXiv 2406.07056.
    """
    r, Dv, E = group.v.shape
    weighted, frames = value_paths(group)
    gram = value_gram(weighted, moment)
    top = torch.linalg.eigh(gram.reshape(r * Dv, r * Dv)).eigenvectors[:, -Dv:]
    value = top.T @ weighted.reshape(r * Dv, E)
    output = frames @ top.view(r, 1, Dv, Dv)
    scale = group.v.square().mean().sqrt() / value.square().mean().sqrt().clamp_min(1e-300)

    group, key, factors = svd_keys(group, moment)
    merged = dataclasses.replace(group, o=output / scale)
    return _with_factors(merged.shared(key, value * scale), factors)


Method = Callable[[Heads, Tensor | None, torch.Generator], Heads]
METHODS: dict[str, Method] = {
    "svd": svd,
    "procrustes": procrustes,
    "mean": mean,
    "first": first,
    "random": random,
}


def value_paths(heads: Heads) -> tuple[Tensor, Tensor]:
    """The value path of every KV head: R_i W_v,i (H, Dv, E) and the orthonormal frames Q_i (H, G, d, Dv)."""
    H, G, d, Dv = heads.o.shape
    frames, factors = torch.linalg.qr(heads.o.reshape(H, G * d, Dv))
    if G * d < Dv:  # a hidden size below the head dim: the frame cannot hold Dv directions
        frames = torch.nn.functional.pad(frames, (0, Dv - G * d))
        factors = torch.nn.functional.pad(factors, (0, 0, 0, Dv - G * d))
    return factors @ heads.v, frames.view(H, G, d, Dv)


def value_gram(weighted: Tensor, moment: Tensor | None) -> Tensor:
    """Joint second moment of the value paths: (H, Dv, E) -> (H, Dv, H, Dv)."""
    H, Dv, E = weighted.shape
    rows = weighted.reshape(H * Dv, E)
    return (times(rows, moment) @ rows.T).view(H, Dv, H, Dv)


def _with_factors(merged: Heads, k_norm: Tensor | None) -> Heads:
    return merged if k_norm is None else dataclasses.replace(merged, k_norm=k_norm[None])
