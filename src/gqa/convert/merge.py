"""Merge the KV heads of a group into one; a function per method.

Each takes the `Heads` of one group (r KV heads, each read by G query heads) and returns the `Heads` of the merged
one: H = 1 KV head read by r * G query heads. What a head loses by sharing is made up as far as possible by its own
change of basis, absorbed into W_q and W_o, which costs nothing at run time.

Letters: r KV heads of the group · G · D · Dv · E inputs (with bias column) · d hidden · F = D/2 rotary pairs.
C (E, E) is the second moment E[x xT] of the attention's input, the identity where no calibration text is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gqa.convert.heads import Heads, from_pairs, to_pairs

# A share of the largest query energy below which a rotary pair of a head counts as never asked for.
_ENERGY_FLOOR = 1e-12


def mean(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """K and V are the mean over the group. Source: Ainslie et al. 2023, arXiv 2305.13245."""
    return _share(group, group.k.mean(0), group.v.mean(0))


def first(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """K and V of the group's first head serve all. Source: Ainslie et al. 2023, arXiv 2305.13245."""
    return _share(group, group.k[0], group.v[0])


def random(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """K and V drawn afresh, with the parent's standard deviation. Source: Ainslie et al. 2023, arXiv 2305.13245."""

    def draw(rows: Tensor) -> Tensor:
        return torch.randn(rows.shape[1:], generator=generator, dtype=rows.dtype) * rows.std()

    return _share(group, draw(group.k), draw(group.v))


def procrustes(group: Heads, moment: Tensor | None, generator: torch.Generator, rounds: int = 30) -> Heads:
    """Turn every head onto the group's mean, then pool: V by any orthogonal map, absorbed into W_o; K by a phase per
    rotary pair, absorbed into W_q. The turns and the mean are improved in turns, starting from the first head.

    Source: Jin et al. 2024, arXiv 2412.20677; the phases are what commutes with the rotary embedding.
    """
    r = len(group.k)
    value_mean = group.v[0]
    turns = torch.eye(group.v.shape[1], dtype=group.v.dtype).expand(r, -1, -1)
    for _ in range(rounds):
        # Orthogonal T minimising |T v - mean|^2 under C: the polar factor of mean C vT.
        left, _, right = torch.linalg.svd(_times(value_mean, moment) @ group.v.mT)
        turns = left @ right
        value_mean = (turns @ group.v).mean(0)

    pairs = to_pairs(group.k)  # (r, F, E)
    key_mean = pairs[0]
    phases = torch.ones(pairs.shape[:2], dtype=pairs.dtype)
    for _ in range(rounds):
        overlap = torch.einsum("fe,rfe->rf", _times(key_mean, moment), pairs.conj())
        phases = torch.where(overlap.abs() > 0, overlap / overlap.abs(), torch.ones_like(overlap))
        key_mean = (phases[..., None] * pairs).mean(0)

    # k_i = conj(phase_i) * key_mean, so the score Re(conj(q) k) wants phase_i * q.
    query = from_pairs(phases[:, None, :, None] * to_pairs(group.q))
    output = group.o @ turns.mT[:, None]
    return _share(Heads(query, group.k, group.v, output), from_pairs(key_mean), value_mean)


def svd(group: Heads, moment: Tensor | None, generator: torch.Generator) -> Heads:
    """The best shared subspace in closed form.

    V/O: with the stacked W_o of head i factored as Q_i R_i, head i contributes Q_i (R_i W_v,i) x. The Dv directions
    that keep most of the energy of all R_i W_v,i x are the top eigenvectors U of their joint second moment
    B C BT (r*Dv, r*Dv); the shared W_v is UT B and head i's W_o is Q_i U_i.

    Q/K: only a complex factor per rotary pair is free. For every pair f, the r rows k_i weighted with their queries'
    energy e_i are approximated by c_i k with one shared row: the top eigenvector u of the Hermitian (r, r) second
    moment gives k = sum conj(u_i) sqrt(e_i) k_i and c_i = u_i / sqrt(e_i); conj(c_i) moves into W_q.

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

    energy = query_energy(group.q, moment)  # (r, F)
    pairs = to_pairs(group.k)
    u = torch.linalg.eigh(key_gram(group.k, energy, moment)).eigenvectors[:, :, -1].T  # (r, F)
    root = energy.sqrt()
    key = ((u.conj() * root)[..., None] * pairs).sum(0)
    factors = u / root
    size = factors.abs().square().mean(0).sqrt()  # so that the queries keep their size on average
    query = from_pairs((factors / size).conj()[:, None, :, None] * to_pairs(group.q))
    merged = Heads(query, group.k, group.v, output / scale)
    return _share(merged, from_pairs(size[:, None] * key), value * scale)


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
    return (_times(rows, moment) @ rows.T).view(H, Dv, H, Dv)


def query_energy(query: Tensor, moment: Tensor | None) -> Tensor:
    """E|q|^2 of every rotary pair, summed over the query heads of a KV head: (H, G, D, E) -> (H, F)."""
    rows = (_times(query, moment) * query).sum((1, 3))
    first, second = rows.chunk(2, dim=-1)
    energy = first + second
    return energy.clamp_min(_ENERGY_FLOOR * energy.max())


def key_gram(key: Tensor, energy: Tensor, moment: Tensor | None) -> Tensor:
    """Second moment of the keys' rotary pairs between heads, weighted by query energy: (H, D, E) -> (F, H, H)."""
    pairs = energy.sqrt()[..., None] * to_pairs(key)
    return torch.einsum("ife,jfe->fij", _times(pairs, moment), pairs.conj())


def _times(rows: Tensor, moment: Tensor | None) -> Tensor:
    return rows if moment is None else rows @ moment.to(rows.dtype)


def _share(group: Heads, key: Tensor, value: Tensor) -> Heads:
    """One KV head for all the query heads of the group."""
    r, G, D, E = group.q.shape
    _, _, d, Dv = group.o.shape
    return Heads(group.q.reshape(1, r * G, D, E), key[None], value[None], group.o.reshape(1, r * G, d, Dv))
