"""Refit W_q and W_k so that a merged head attends where its parent heads attended, by least squares.

Letters: n windows · T tokens · r*G query heads of one group · D head dim · E inputs (with bias column).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gqa.convert.heads import Heads, from_pairs, to_pairs

# Tokens of the calibration text that the fit looks at.
SCORE_TOKENS = 4096

# Conjugate-gradient steps per matrix; the matrices take turns, the queries first and last.
_STEPS = 10
_TURNS = ("q", "k", "q")

# Ridge that ties a matrix to its closed form, as a share of the mean curvature.
_RIDGE = 1e-3

# Windows per product: keeps the (n, r*G, T, T) intermediates small enough to be reused by the allocator.
_BATCH = 4


@dataclass(frozen=True)
class Positions:
    """What the model does to queries and keys around their product. turns (T, F): the rotary factor of every position
    and pair; visible (T, T): which keys a query sees; scale: of the scores; softcap: the bound that tanh gives them."""

    turns: Tensor
    visible: Tensor
    scale: float
    softcap: float | None = None


def refit_scores(child: Heads, parent: Heads, child_inputs: Tensor, parent_inputs: Tensor, where: Positions) -> Heads:
    """W_q and W_k of one merged head (child, H = 1), fitted to the scores of the heads it stands for.

    Minimises, over all tokens t and query heads, the variance under the parent's attention a of the score's error,

        sum_t Var_{s ~ a(t, .)} [scale * (q'_t . k'_s - q_t . k_s)]

    which is, to second order, twice the KL divergence between the two attentions: what no softmax can see (a shift
    that all keys share) costs nothing, and keys count as much as they are looked at. Each of W_q, W_k alone is a
    linear least-squares problem, solved by conjugate gradients from the closed form on. Source: ours.

    child_inputs and parent_inputs (n, T, d): what each attention is given. parent holds the group's heads in the
    order of the child's query heads. Sinks and soft caps weigh in through a; the error is that of the bare scores.
    """
    fit = _Fit(child, parent, child_inputs, parent_inputs, where)
    matrices = {"q": child.q[0].to(fit.dtype), "k": child.k[0].to(fit.dtype)}
    for turn in _TURNS:
        matrices[turn] = fit.solve(turn, matrices["q"], matrices["k"])
    return dataclasses.replace(child, q=matrices["q"][None].double(), k=matrices["k"][None].double())


class _Fit:
    def __init__(self, child: Heads, parent: Heads, child_inputs: Tensor, parent_inputs: Tensor, where: Positions):
        self.dtype = child_inputs.dtype
        self.turns = where.turns
        self.scale = where.scale
        E = child.q.shape[-1]
        self.inputs = [_with_ones(x, E) for x in child_inputs.split(_BATCH)]
        q, k = parent.q.to(self.dtype), parent.k.to(self.dtype)
        self.scores, self.attention = [], []
        for x in parent_inputs.split(_BATCH):
            x = _with_ones(x, E)
            keys = self._turned(x, k).repeat_interleave(q.shape[1], 1)
            scores = self._turned(x, q.flatten(0, 1)) @ keys.mT * self.scale
            self.attention.append(_attention(scores, where, parent.sinks))
            self.scores.append(scores)

    def solve(self, turn: str, q: Tensor, k: Tensor) -> Tensor:
        """The best W_q (r*G, D, E) for this W_k (D, E), or the other way round, near the one given."""
        start = q if turn == "q" else k
        fixed = [self._turned(x, k[None] if turn == "q" else q) for x in self.inputs]

        def curvature(matrix: Tensor) -> Tensor:
            return self._pull(turn, matrix, fixed, with_target=False)

        residual = -self._pull(turn, start, fixed, with_target=True)
        signs = torch.empty(start.shape, dtype=start.dtype)
        probe = (signs.bernoulli_(0.5, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(start.device)
        ridge = _RIDGE * float((probe * curvature(probe)).mean())
        return start + _conjugate_gradients(lambda m: curvature(m) + ridge * m, residual, _STEPS)

    def _pull(self, turn: str, matrix: Tensor, fixed: list[Tensor], *, with_target: bool) -> Tensor:
        """The gradient of half the objective in W_q or W_k; without the target it is the curvature times `matrix`."""
        total = torch.zeros_like(matrix)
        rows = matrix if matrix.ndim == 3 else matrix[None]
        for index, (x, other) in enumerate(zip(self.inputs, fixed, strict=True)):
            moved = self._turned(x, rows)
            error = (moved @ other.mT if turn == "q" else other @ moved.mT) * self.scale
            if with_target:
                error -= self.scores[index]
            a = self.attention[index]
            error -= (a * error).sum(-1, keepdim=True)
            error *= a
            pulled = error @ other if turn == "q" else (error.mT @ other).sum(1, keepdim=True)
            back = self._turned_back(pulled) * self.scale
            total += torch.einsum("nhtd,nte->hde", back, x).view_as(total)
        return total

    def _turned(self, x: Tensor, rows: Tensor) -> Tensor:
        """Project and rotate: x (n, T, E), rows (heads, D, E) -> (n, heads, T, D)."""
        return self._turn(torch.einsum("nte,hde->nhdt", x, rows), self.turns.T).mT

    def _turned_back(self, states: Tensor) -> Tensor:
        """The transpose of the rotation: (n, heads, T, D) -> (n, heads, T, D)."""
        return self._turn(states.mT, self.turns.T.conj()).mT

    def _turn(self, rows: Tensor, turns: Tensor) -> Tensor:
        """Turn the first rows of (..., D, T) by (F, T); the others have no rotary embedding."""
        R = 2 * len(turns)
        return torch.cat([from_pairs(to_pairs(rows[..., :R, :]) * turns), rows[..., R:, :]], -2)


def _attention(scores: Tensor, where: Positions, sinks: Tensor | None) -> Tensor:
    """The attention of scores (n, heads, T, T); what goes to the sinks is missing from its rows."""
    if where.softcap:
        scores = where.softcap * (scores / where.softcap).tanh()
    scores = scores.masked_fill(~where.visible, float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    beside = sinks.to(scores.dtype).flatten()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, beside], -1).softmax(-1)[..., :-1]


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], wanted: Tensor, steps: int) -> Tensor:
    """Solve apply(x) = wanted for a symmetric positive definite map, from zero, in at most `steps` steps."""
    solution = torch.zeros_like(wanted)
    residual, direction = wanted.clone(), wanted.clone()
    power = first = residual.square().sum()
    for _ in range(steps):
        if power <= 1e-20 * first or power == 0:
            break
        mapped = apply(direction)
        length = power / (direction * mapped).sum()
        solution += length * direction
        residual -= length * mapped
        previous, power = power, residual.square().sum()
        direction = residual + power / previous * direction
    return solution


def _with_ones(x: Tensor, E: int) -> Tensor:
    return x if x.shape[-1] == E else torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
