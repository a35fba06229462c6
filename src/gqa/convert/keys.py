"""Merge the keys of a group of KV heads, and what that asks of their queries.

Free maps of a head's keys, undone in its queries at no cost at run time, are those that commute with what lies between
the projections and their product: a complex factor per rotary pair, any invertible map of the rows that the rotary
embedding leaves alone; and under a norm of each head by itself only those that keep lengths.

A norm divides by a length that depends on the token. It is taken as constant here, the root of its mean square
(`effective`), and put back at the end (`_restore`): exact for copies of one head and for maps that turn pairs whose two
factors are equal, else an approximation.

Letters: r KV heads of the group · G · D = R + P · R rows in F = R/2 rotary pairs · P rows without rotary · E inputs.
C (E, E) is the second moment of the attention's input, the identity where it is None.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gqa.convert.heads import Heads, from_pairs, to_pairs

# A share of the largest query energy below which a direction counts as never asked for.
_ENERGY_FLOOR = 1e-12

_ROUNDS = 30


def effective(heads: Heads, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (H, G, D, E) and k (H, D, E) as they meet the rotary embedding, a norm's length taken as constant."""
    norm = heads.norm
    if norm is None or heads.q_norm is None or heads.k_norm is None:
        return heads.q, heads.k

    def through(rows: Tensor, factors: Tensor) -> Tensor:
        if norm.kind == "layer":
            rows = rows - rows.mean(-2, keepdim=True)
        if norm.over == "head":
            rows = rows / _length(rows, moment)
        return factors[..., None] * rows

    return through(heads.q, heads.q_norm), through(heads.k, heads.k_norm)


def svd_keys(group: Heads, moment: Tensor | None) -> tuple[Heads, Tensor, Tensor | None]:
    """The best shared keys in closed form: the group with its queries changed, the key (D, E) and its norm's factors.

    Rotary pairs: for every pair f, the r rows k_i weighted with their queries' energy e_i are approximated by c_i k
    with one shared row: the top eigenvector u of the Hermitian (r, r) second moment gives k = sum conj(u_i) sqrt(e_i)
    k_i and c_i = u_i / sqrt(e_i); conj(c_i) moves into W_q. Under a norm of each head only the phase of c_i is free.

    The other rows: with N_i = sum_g W_q,ig C W_q,igT (P, P) of head i's queries, the top P eigenvectors U of the joint
    second moment of N_i^(1/2) W_k,i give W_k = sum U_iT N_i^(1/2) W_k,i, and U_iT N_i^(-1/2) moves into W_q.
    """
    q, k = effective(group, moment)
    R = group.turned
    queries, keys = [], []
    if R:
        energy = query_energy(q[..., :R, :], moment)
        u = torch.linalg.eigh(key_gram(k[:, :R], energy, moment)).eigenvectors[:, :, -1].T  # (r, F)
        if _keeps_lengths(group):
            start = ((u.conj() * energy.sqrt())[..., None] * to_pairs(k[:, :R])).sum(0)
            query, key = _turn_pairs(q[..., :R, :], k[:, :R], moment, energy, start)
        else:
            root = energy.sqrt()
            u = u * _unit((u * energy).sum(0)).conj()  # of all that are equally good, the one that turns least
            key = ((u.conj() * root)[..., None] * to_pairs(k[:, :R])).sum(0)
            factors = u / root
            size = factors.abs().square().mean(0).sqrt()  # so that the queries keep their size on average
            query = from_pairs((factors / size).conj()[:, None, :, None] * to_pairs(q[..., :R, :]))
            key = from_pairs(size[:, None] * key)
        queries.append(query)
        keys.append(key)
    if k.shape[1] > R:
        merge = _turn_rows if group.norm is not None else _share_rows
        query, key = merge(q[..., R:, :], k[:, R:], moment)
        queries.append(query)
        keys.append(key)
    return _restore(group, torch.cat(queries, -2), torch.cat(keys, -2), moment)


def procrustes_keys(group: Heads, moment: Tensor | None) -> tuple[Heads, Tensor, Tensor | None]:
    """Every head turned onto the group's mean: a phase per rotary pair, an orthogonal map of the other rows."""
    q, k = effective(group, moment)
    R = group.turned
    queries, keys = [], []
    if R:
        alike = k.new_ones(len(k), R // 2)
        query, key = _turn_pairs(q[..., :R, :], k[:, :R], moment, alike, to_pairs(k[0, :R]))
        queries.append(query)
        keys.append(key)
    if k.shape[1] > R:
        query, key = _turn_rows(q[..., R:, :], k[:, R:], moment)
        queries.append(query)
        keys.append(key)
    return _restore(group, torch.cat(queries, -2), torch.cat(keys, -2), moment)


def turn_onto_mean(rows: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Orthogonal maps T_i (r, P, P) and the mean of T_i rows_i (P, E), improved in turns from the first head on.

    rows (r, P, E). T_i is the polar factor of mean C rows_iT: the best for |T_i rows_i - mean|^2 under C.
    """
    mean = rows[0]
    turns = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device).expand(len(rows), -1, -1)
    for _ in range(_ROUNDS):
        left, _, right = torch.linalg.svd(times(mean, moment) @ rows.mT)
        turns = left @ right
        mean = (turns @ rows).mean(0)
    return turns, mean


def query_energy(query: Tensor, moment: Tensor | None) -> Tensor:
    """E|q|^2 of every rotary pair, summed over the query heads of a KV head: (H, G, R, E) -> (H, F)."""
    rows = (times(query, moment) * query).sum((1, 3))
    first, second = rows.chunk(2, dim=-1)
    energy = first + second
    return energy.clamp_min(_ENERGY_FLOOR * energy.max())


def key_gram(key: Tensor, energy: Tensor, moment: Tensor | None) -> Tensor:
    """Second moment of the keys' rotary pairs between heads, weighted by query energy: (H, R, E) -> (F, H, H)."""
    pairs = energy.sqrt()[..., None] * to_pairs(key)
    return torch.einsum("ife,jfe->fij", times(pairs, moment), pairs.conj())


def row_paths(query: Tensor, key: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """N_i^(1/2) W_k,i (H, P, E) of rows without rotary, and N_i^(-1/2) (H, P, P); N_i is told in `svd_keys`."""
    energy = torch.einsum("hgpe,hgqe->hpq", times(query, moment), query)
    values, vectors = torch.linalg.eigh(energy)
    root = values.clamp_min(_ENERGY_FLOOR * values.max()).clamp_min(1e-300).sqrt()
    return (vectors * root[:, None]) @ vectors.mT @ key, (vectors / root[:, None]) @ vectors.mT


def times(rows: Tensor, moment: Tensor | None) -> Tensor:
    """rows C."""
    return rows if moment is None else rows @ moment.to(rows.dtype)


def _turn_pairs(
    query: Tensor, key: Tensor, moment: Tensor | None, weights: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn pair f of every head i by phase_i,f so that the mean under weights (r, F) serves all best.

    start (F, E) is the first mean; phases and mean are improved in turns. The phases turn the queries too.
    """
    pairs = to_pairs(key)
    mean, phases = start, torch.ones_like(pairs[..., 0])
    for _ in range(_ROUNDS):
        phases = _unit(torch.einsum("fe,rfe->rf", times(mean, moment), pairs.conj()))
        phases = phases * _unit((phases * weights).sum(0)).conj()  # of all that are equally good, the least turn
        mean = ((weights * phases)[..., None] * pairs).sum(0) / weights.sum(0)[:, None]
    return from_pairs(phases[:, None, :, None] * to_pairs(query)), from_pairs(mean)


def _turn_rows(query: Tensor, key: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    turns, mean = turn_onto_mean(key, moment)
    return turns[:, None] @ query, mean


def _share_rows(query: Tensor, key: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    r, P, E = key.shape
    weighted, inverse = row_paths(query, key, moment)
    rows = weighted.reshape(r * P, E)
    top = torch.linalg.eigh(times(rows, moment) @ rows.T).eigenvectors[:, -P:]
    shared = top.T @ rows
    scale = key.square().mean().sqrt() / shared.square().mean().sqrt().clamp_min(1e-300)
    maps = top.view(r, P, P).mT @ inverse
    return maps[:, None] @ query / scale, shared * scale


def _restore(group: Heads, query: Tensor, key: Tensor, moment: Tensor | None) -> tuple[Heads, Tensor, Tensor | None]:
    """Undo `effective`: projections and factors that give these rows after the norm."""
    norm = group.norm
    if norm is None or group.q_norm is None or group.k_norm is None:
        return replace(group, q=query), key, None
    q_norm, k_norm = group.q_norm, group.k_norm.mean(0)
    if norm.over == "head":
        query = query / _safe(q_norm)[..., None] * _length(group.q, moment)
        key = key / _safe(k_norm)[:, None] * _length(group.k, moment).mean(0)
        return replace(group, q=query), key, k_norm
    # The lengths of pairs go into the factors, so that the norm divides by what it did before.
    old, _ = effective(group, moment)
    ratio = _pair_length(query) / _pair_length(old).clamp_min(1e-300)
    q_norm = q_norm * torch.cat([ratio, ratio], -1)
    key = key / _safe(k_norm)[:, None]
    grown = _length(group.k, moment).square().mean().sqrt() / _length(key, moment).squeeze()
    return replace(group, q=query / _safe(q_norm)[..., None], q_norm=q_norm), key * grown, k_norm / grown


def _keeps_lengths(group: Heads) -> bool:
    return group.norm is not None and group.norm.over == "head"


def _length(rows: Tensor, moment: Tensor | None) -> Tensor:
    """Root mean square of rows x over rows and inputs: (..., D, E) -> (..., 1, 1)."""
    square = (times(rows, moment) * rows).sum((-1, -2), keepdim=True) / rows.shape[-2]
    return square.sqrt().clamp_min(1e-300)


def _pair_length(rows: Tensor) -> Tensor:
    return to_pairs(rows).abs().square().sum(-1).sqrt()


def _safe(factors: Tensor) -> Tensor:
    """Factors to divide by: none closer to zero than a millionth of their root mean square."""
    least = 1e-6 * factors.square().mean().sqrt().clamp_min(1e-300)
    return torch.where(factors.abs() < least, least, factors)


def _unit(numbers: Tensor) -> Tensor:
    """Complex numbers at length 1; 1 where they are zero."""
    return torch.where(numbers.abs() > 0, numbers / numbers.abs(), torch.ones_like(numbers))
