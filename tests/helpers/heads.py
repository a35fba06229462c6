"""Attention heads made for tests, and what they compute, spelled out.

Letters: r KV heads of a group, G queries per KV head, D, Dv head dims, E inputs, d hidden.
"""

import torch

from gqa.convert.heads import Heads, from_pairs, to_pairs


def random_heads(r, G, D, Dv, d, E, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return Heads(draw(r, G, D, E), draw(r, D, E), draw(r, Dv, E), draw(r, G, d, Dv))


def scrambled_copies(one: Heads, r: int, seed=0) -> Heads:
    """r copies of one KV head (each with its own query heads), each turned by maps that leave its function alone."""
    generator = torch.Generator().manual_seed(seed + 1)
    copies = []
    for i in range(r):
        own = random_heads(1, one.q.shape[1], one.q.shape[2], one.v.shape[1], one.o.shape[2], one.q.shape[3], seed=100 + i)
        angle = torch.rand(one.k.shape[1] // 2, generator=generator, dtype=torch.float64) * 6.28
        phase = torch.polar(torch.ones_like(angle), angle)
        turn, _ = torch.linalg.qr(torch.randn(*one.v.shape[1:2] * 2, generator=generator, dtype=torch.float64))
        copies.append(
            Heads(
                q=from_pairs(phase[:, None] * to_pairs(own.q)),
                k=from_pairs(phase[:, None] * to_pairs(one.k)),
                v=turn @ one.v,
                o=own.o @ turn.T,
            )
        )
    return Heads(*(torch.cat([getattr(c, field) for c in copies]) for field in ("q", "k", "v", "o")))


def scores(heads: Heads, x):
    """Scores of every query head under the rotary embedding: x (T, E) -> (query heads, T, T)."""
    H, G, D, E = heads.q.shape
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * (0.7 ** torch.arange(D // 2, dtype=torch.float64))
    turn = torch.polar(torch.ones_like(angles), angles).T  # (F, T)
    q = to_pairs(heads.q @ x.T) * turn
    k = to_pairs(heads.k @ x.T) * turn
    return torch.einsum("hgft,hfs->hgts", q.conj(), k).real.reshape(H * G, len(x), len(x))


def contributions(heads: Heads, x):
    """What every query head would add to the output for attending to one token: (query heads, d, T)."""
    H, G, d, Dv = heads.o.shape
    return torch.einsum("hgdv,hve,te->hgdt", heads.o, heads.v, x).reshape(H * G, d, len(x))
