"""Attention heads made for tests, and what they compute, spelled out.

Letters: r KV heads of a group, G queries per KV head, D, Dv head dims, E inputs, d hidden.
"""

import dataclasses

import torch

from gqa.convert.heads import Heads, from_pairs, to_pairs


def random_heads(r, G, D, Dv, d, E, seed=0, rotary=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return Heads(draw(r, G, D, E), draw(r, D, E), draw(r, Dv, E), draw(r, G, d, Dv), rotary)


def scramble(heads: Heads, generator: torch.Generator, *, rows: str = "invertible") -> Heads:
    """Turn every head by maps that leave what it computes alone: a phase per rotary pair, an orthogonal map of V, and
    an `invertible` or `orthogonal` one of the rows of K without rotary."""
    H, D, Dv, R = len(heads.k), heads.k.shape[1], heads.v.shape[1], heads.turned

    def orthogonal(size):
        return torch.linalg.qr(torch.randn(H, size, size, generator=generator, dtype=torch.float64))[0]

    angle = torch.rand(H, R // 2, generator=generator, dtype=torch.float64) * 6.28
    phase = torch.polar(torch.ones_like(angle), angle)[..., None]
    turn, plain = orthogonal(Dv), orthogonal(D - R)
    if rows == "invertible":
        plain = plain * torch.linspace(0.5, 2, D - R, dtype=torch.float64)
    back = torch.linalg.inv(plain).mT
    q, k = heads.q, heads.k
    return dataclasses.replace(
        heads,
        q=torch.cat([from_pairs(phase[:, None] * to_pairs(q[:, :, :R])), back[:, None] @ q[:, :, R:]], -2),
        k=torch.cat([from_pairs(phase * to_pairs(k[:, :R])), plain @ k[:, R:]], -2),
        v=turn @ heads.v,
        o=heads.o @ turn.mT[:, None],
    )


def scrambled_copies(one: Heads, r: int, seed=0, rows="invertible") -> Heads:
    """r scrambled copies of one KV head, each read by query heads of its own."""
    G, D, Dv, d, E = *one.q.shape[1:3], one.v.shape[1], one.o.shape[2], one.q.shape[3]
    own = random_heads(r, G, D, Dv, d, E, seed=seed + 100)
    copies = Heads(own.q, one.k.expand(r, -1, -1), one.v.expand(r, -1, -1), own.o, one.rotary)
    return scramble(copies, torch.Generator().manual_seed(seed + 1), rows=rows)


def scores(heads: Heads, x):
    """Scores of every query head under the rotary embedding: x (T, E) -> (query heads, T, T)."""
    H, G = heads.q.shape[:2]
    R = heads.turned
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * (0.7 ** torch.arange(R // 2, dtype=torch.float64))
    turn = torch.polar(torch.ones_like(angles), angles).T  # (F, T)
    q, k = heads.q @ x.T, heads.k @ x.T
    turned = torch.einsum("hgft,hfs->hgts", (to_pairs(q[:, :, :R]) * turn).conj(), to_pairs(k[:, :R]) * turn).real
    plain = torch.einsum("hgpt,hps->hgts", q[:, :, R:], k[:, R:])
    return (turned + plain).reshape(H * G, len(x), len(x))


def contributions(heads: Heads, x):
    """What every query head would add to the output for attending to one token: (query heads, d, T)."""
    H, G, d = heads.o.shape[:3]
    return torch.einsum("hgdv,hve,te->hgdt", heads.o, heads.v, x).reshape(H * G, d, len(x))
