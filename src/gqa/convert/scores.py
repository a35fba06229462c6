"""Refit W_q and W_k so that a merged head attends where its parent heads attended, by least squares.

Letters: n windows · T tokens · r*G query heads of one group · D head dim · E inputs (with bias column).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gqa.config import LayerShape
from gqa.convert.heads import Heads, from_pairs, to_pairs
from gqa.weights.layout import Norm

# Conjugate-gradient steps per matrix; the matrices take turns, the queries first and last.
_STEPS = 10
_TURNS = ("q", "k", "q")

# Products with the curvature in all.
SOLVES = len(_TURNS) * (_STEPS + 2)

# Ridge that ties a matrix to its closed form, as a share of the mean curvature.
_RIDGE = 1e-3

# What models add to a head's mean square before they divide by its root; they differ, and it hardly matters.
_NORM_FLOOR = 1e-6

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


def score_tokens(hidden: int) -> int:
    """How many tokens of the text the fit looks at: more than four per input give little to a small model, one per
    input half of what can be had (docs/LOG.md), and the time is proportional to them."""
    return max(4096, 2 * hidden)


def can_refit(norm: Norm | None, shape: LayerShape) -> bool:
    """Whether a group's scores follow from its own projections: not so where a norm is over all heads together, or
    where ALiBi adds to the scores."""
    return not shape.alibi and (norm is None or norm.over == "head")


def refit_scores(child: Heads, parent: Heads, child_inputs: Tensor, parent_inputs: Tensor, where: Positions) -> Heads:
    """W_q and W_k of one merged head (child, H = 1), fitted to the scores of the heads it stands for.

    Minimises, over all tokens t and query heads, the variance under the parent's attention a of the score's error,

        sum_t Var_{s ~ a(t, .)} [scale * (q'_t . k'_s - q_t . k_s)]

    which is, to second order, twice the KL divergence between the two attentions: what no softmax can see (a shift
    that all keys share) costs nothing, and keys count as much as they are looked at. Each of W_q, W_k alone is a
    linear least-squares problem, solved by conjugate gradients from the closed form on. A norm of each head between
    projection and rotary embedding is linearised where a turn begins (a step of Gauss and Newton). Source: ours.

    child_inputs and parent_inputs (n, T, d): what each attention is given. parent holds the group's heads in the
    order of the child's query heads. Sinks and soft caps weigh in through a; the error is that of the bare scores.
    """
    fit = _Fit(child, parent, child_inputs, parent_inputs, where)
    matrices = {"q": child.q[0].to(fit.dtype), "k": child.k.to(fit.dtype)}
    for turn in _TURNS:
        matrices[turn] = fit.solve(turn, matrices["q"], matrices["k"])
    return dataclasses.replace(child, q=matrices["q"][None].double(), k=matrices["k"].double())


class _Fit:
    def __init__(self, child: Heads, parent: Heads, child_inputs: Tensor, parent_inputs: Tensor, where: Positions):
        self.dtype = child_inputs.dtype
        self.turns = where.turns
        self.scale = where.scale
        self.norm = parent.norm
        E = child.q.shape[-1]
        self.inputs = [_with_ones(x, E) for x in child_inputs.split(_BATCH)]
        self.factors = {"q": self._factors(child.q_norm), "k": self._factors(child.k_norm)}
        q, k = parent.q.to(self.dtype), parent.k.to(self.dtype)
        self.scores, self.attention = [], []
        for x in parent_inputs.split(_BATCH):
            x = _with_ones(x, E)
            queries = _Side(self, x, q.flatten(0, 1), self._factors(parent.q_norm)).value
            keys = _Side(self, x, k, self._factors(parent.k_norm)).value
            scores = queries @ keys.repeat_interleave(q.shape[1], 1).mT * self.scale
            self.attention.append(_attention(scores, where, parent.sinks))
            self.scores.append(scores)

    def _factors(self, norm: Tensor | None) -> Tensor | None:
        """A norm's factors head by head: (heads, D)."""
        return None if norm is None else norm.to(self.dtype).reshape(-1, norm.shape[-1])

    def solve(self, turn: str, q: Tensor, k: Tensor) -> Tensor:
        """The best W_q (r*G, D, E) for this W_k (1, D, E), or the other way round, near the one given."""
        start = q if turn == "q" else k
        moving, fixed = self._sides(turn, q, k)

        def curvature(change: Tensor) -> Tensor:
            return self._pull(turn, moving, fixed, [side.change(change) for side in moving])

        residual = -self._pull(turn, moving, fixed, [side.value for side in moving], self.scores)
        signs = torch.empty(start.shape, dtype=start.dtype)
        probe = (signs.bernoulli_(0.5, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(start.device)
        ridge = _RIDGE * float((probe * curvature(probe)).mean())
        return start + _conjugate_gradients(lambda m: curvature(m) + ridge * m, residual, _STEPS)

    def _sides(self, turn: str, q: Tensor, k: Tensor) -> tuple[list[_Side], list[Tensor]]:
        """What moves, batch after batch, and the values of what does not."""
        other = "k" if turn == "q" else "q"
        matrices = {"q": q, "k": k}
        moving = [_Side(self, x, matrices[turn], self.factors[turn]) for x in self.inputs]
        return moving, [_Side(self, x, matrices[other], self.factors[other]).value for x in self.inputs]

    def _pull(
        self,
        turn: str,
        moving: list[_Side],
        fixed: list[Tensor],
        values: list[Tensor],
        targets: list[Tensor] | None = None,
    ) -> Tensor:
        """The gradient of half the objective in W_q or W_k, where the moving side has these values; without targets,
        and with its changes for values, it is the curvature times what changed."""
        total = 0.0
        for index, (side, value, other) in enumerate(zip(moving, values, fixed, strict=True)):
            error = (value @ other.mT if turn == "q" else other @ value.mT) * self.scale
            if targets is not None:
                error -= targets[index]
            a = self.attention[index]
            error -= (a * error).sum(-1, keepdim=True)
            error *= a
            pulled = error @ other if turn == "q" else (error.mT @ other).sum(1, keepdim=True)
            total = total + side.back(pulled * self.scale)
        assert isinstance(total, Tensor)
        return total


class _Side:
    """Queries or keys x (n, T, E) -> value (n, heads, T, D) as they meet the other side: projected by rows
    (heads, D, E), normed where there are factors (heads, D), turned; and the linear map that a small change of the
    rows goes through."""

    def __init__(self, fit: _Fit, x: Tensor, rows: Tensor, factors: Tensor | None) -> None:
        self.x, self.turns, self.factors = x, fit.turns.T, None
        states = self._project(rows)
        if factors is not None:
            assert fit.norm is not None
            assert fit.norm.over == "head", "the norm of all heads together is not a head's"
            self.factors, self.centred = factors[:, :, None], fit.norm.kind == "layer"
            states = self._centre(states)
            self.inverse = (states.square().mean(-2, keepdim=True) + _NORM_FLOOR).rsqrt()
            self.unit = states * self.inverse
            states = self.unit * self.factors
        self.value = self._turn(states, self.turns).mT

    def change(self, rows: Tensor) -> Tensor:
        """What a change of the rows (heads, D, E) does to the value, to first order."""
        states = self._project(rows)
        if self.factors is not None:
            states = self._across(self._centre(states)) * self.inverse * self.factors
        return self._turn(states, self.turns).mT

    def back(self, pulled: Tensor) -> Tensor:
        """The transpose of `change`: (n, heads, T, D) -> (heads, D, E)."""
        states = self._turn(pulled.mT, self.turns.conj())
        if self.factors is not None:
            states = self._centre(self._across(states * self.factors * self.inverse))
        return torch.einsum("nhdt,nte->hde", states, self.x)

    def _project(self, rows: Tensor) -> Tensor:
        return torch.einsum("nte,hde->nhdt", self.x, rows)

    def _centre(self, states: Tensor) -> Tensor:
        return states - states.mean(-2, keepdim=True) if self.centred else states

    def _across(self, states: Tensor) -> Tensor:
        """Without the part along the normed vector, which changes its length alone."""
        return states - self.unit * (self.unit * states).mean(-2, keepdim=True)

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
