"""Letters: n windows, T tokens, r KV heads of a group, G queries each, D head dim, E inputs."""

import dataclasses

import pytest
import torch
from helpers.heads import random_heads, scrambled_copies

from gqa.convert import merge
from gqa.convert.scores import Positions, _conjugate_gradients, _Fit, _Side, refit_scores
from gqa.weights.layout import Norm

n, T = 5, 11


def positions(D, *, window=None, softcap=None, dtype=torch.float64):
    angles = torch.arange(T, dtype=dtype)[:, None] * (0.6 ** torch.arange(D // 2, dtype=dtype))
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    if window:
        visible &= torch.ones(T, T, dtype=torch.bool).triu(1 - window)
    return Positions(torch.polar(torch.ones_like(angles), angles), visible, max(D, 1) ** -0.5, softcap)


def draw(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(q, k, x, where):
    """log-attention of every query head, spelled out: q (heads, D, E), k (D, E) or (heads, D, E), x (n, T, E)."""
    D = q.shape[1]
    cos, sin = where.turns.real, where.turns.imag

    def turn(states):
        first, second = states[..., : D // 2], states[..., D // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    k = k.expand(len(q), *k.shape[-2:])
    rows = [turn(x @ q[h].T) @ turn(x @ k[h].T).mT * where.scale for h in range(len(q))]
    scores = torch.stack(rows, 1)
    return scores, scores.masked_fill(~where.visible, float("-inf")).log_softmax(-1)


def objective(q, k, parent_q, parent_k, x, parent_x, where):
    scores, _ = attention(q, k, x, where)
    wanted, log_a = attention(parent_q, parent_k, parent_x, where)
    a, error = log_a.exp(), scores - wanted
    return (a * (error - (a * error).sum(-1, keepdim=True)).square()).sum() / 2


@pytest.mark.parametrize("window", [None, 4], ids=["causal", "window"])
@pytest.mark.parametrize("turn", ["q", "k"])
def test_the_gradient_is_that_of_the_objective(turn, window):
    group = random_heads(2, 3, 6, 4, 7, E=7)
    where = positions(6, window=window)
    x, parent_x = draw(n, T, 7, seed=1) / 2, draw(n, T, 7, seed=2) / 2
    q, k = draw(6, 6, 7, seed=3), draw(6, 7, seed=4)
    fit = _Fit(merge.mean(group, None, torch.Generator()), group, x, parent_x, where)
    moving, fixed = fit._sides(turn, q, k[None])
    got = fit._pull(turn, moving, fixed, [side.value for side in moving], fit.scores)
    got = got if turn == "q" else got[0]

    free = (q if turn == "q" else k).clone().requires_grad_(True)
    parts = (free, k) if turn == "q" else (q, free)
    parent_k = group.k.repeat_interleave(3, 0)
    loss = objective(*parts, group.q.flatten(0, 1), parent_k, x, parent_x, where)
    torch.testing.assert_close(got, torch.autograd.grad(loss, free)[0])


def test_refitted_heads_attend_more_like_their_parents():
    group = random_heads(4, 1, 8, 4, 12, E=12)
    where, x = positions(8), draw(n, T, 12, seed=1) / 3  # small: the objective is of second order
    child = merge.svd(group, None, torch.Generator())
    better = refit_scores(child, group, x, x, where)
    _, wanted = attention(group.q[:, 0], group.k, x, where)

    def divergence(heads):
        _, got = attention(heads.q[0], heads.k[0], x, where)
        return (wanted.exp() * (wanted - got))[..., where.visible].sum().item()

    assert divergence(better) < 0.5 * divergence(child)
    assert torch.equal(better.v, child.v)
    assert torch.equal(better.o, child.o)


def test_heads_that_are_exact_stay_exact():
    group = scrambled_copies(random_heads(1, 2, 6, 4, 9, E=9), 3)
    where, x = positions(6), draw(n, T, 9, seed=1)
    child = merge.svd(group, None, torch.Generator())
    again = refit_scores(child, group, x, x, where)
    torch.testing.assert_close(again.q, child.q, rtol=0, atol=1e-10)
    torch.testing.assert_close(again.k, child.k, rtol=0, atol=1e-10)


def test_biases_are_fitted_too():
    group = random_heads(2, 1, 6, 4, 9, E=10)  # nine inputs and a column for the bias
    child = merge.svd(group, None, torch.Generator())
    x = draw(n, T, 9, seed=1)
    assert refit_scores(child, group, x, x, positions(6)).q.shape == (1, 2, 6, 10)


def test_conjugate_gradients_solve():
    root = draw(6, 6)
    matrix = root @ root.T + torch.eye(6, dtype=torch.float64)
    wanted = draw(6, seed=1)
    got = _conjugate_gradients(lambda x: matrix @ x, wanted, steps=6)
    torch.testing.assert_close(got, torch.linalg.solve(matrix, wanted))
    assert not _conjugate_gradients(lambda x: matrix @ x, torch.zeros(6), steps=6).any()


@pytest.mark.parametrize("rotary", [0, 4])
def test_rows_without_rotary_are_not_turned(rotary):
    """A head of R rows with rotary and some without scores as its two parts do."""
    group = random_heads(2, 1, 10, 4, 7, E=7, rotary=rotary)
    where = positions(rotary)
    x = draw(n, T, 7, seed=1)
    fit = _Fit(group, group, x, x, where)
    q, k = group.q[:, 0], group.k
    plain = torch.einsum("hpe,nte,hpf,nsf->nhts", q[:, rotary:], x, k[:, rotary:], x) * where.scale
    turned = attention(q[:, :rotary], k[:, :rotary], x, where)[0] if rotary else 0
    torch.testing.assert_close(torch.cat(fit.scores), turned + plain)


NORMS = {
    "none": None,
    "rms": Norm("rms", "head", shared=True),
    "layer": Norm("layer", "head", shared=False),
}


def normed(group, norm):
    """With a norm of every head, and factors that differ."""
    if norm is None:
        return group
    r, G, D, _ = group.q.shape
    return dataclasses.replace(
        group, norm=norm, q_norm=1 + draw(r, G, D, seed=8) / 4, k_norm=1 + draw(r, D, seed=9) / 4
    )


@pytest.mark.parametrize("rotary", [None, 4])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_change_is_the_derivative_and_back_its_transpose(norm, rotary):
    group = normed(random_heads(3, 1, 6, 4, 7, E=7, rotary=rotary), norm)
    x = draw(n, T, 7, seed=1)
    fit = _Fit(group, group, x, x, positions(6 if rotary is None else rotary))
    factors = None if norm is None else group.k_norm
    side = _Side(fit, x, group.k, factors)
    delta, pulled = draw(3, 6, 7, seed=2), draw(n, 3, T, 6, seed=3)
    slope = torch.func.jvp(lambda rows: _Side(fit, x, rows, factors).value, (group.k,), (delta,))[1]
    torch.testing.assert_close(side.change(delta), slope, rtol=0, atol=1e-4 if norm else 1e-12)
    forward, backward = (side.change(delta) * pulled).sum(), (side.back(pulled) * delta).sum()
    torch.testing.assert_close(forward, backward)
    if norm is None:
        torch.testing.assert_close(side.value, side.change(group.k))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_norm_is_fitted_through(norm):
    """A group whose merged head has lost by sharing attends more like its parents afterwards."""
    group = normed(random_heads(3, 1, 8, 4, 12, E=12), NORMS[norm])
    where, x = positions(8), draw(n, T, 12, seed=1)
    child = merge.svd(group, moment=None, generator=torch.Generator())
    better = refit_scores(child, group, x, x, where)
    wanted = torch.cat(_Fit(group, group, x, x, where).attention)

    def divergence(heads):
        got = torch.cat(_Fit(heads, heads, x, x, where).attention)
        some = where.visible.expand_as(wanted)
        return (wanted[some] * (wanted[some] / got[some]).log()).sum().item()

    assert divergence(better) < 0.5 * divergence(child)
    assert torch.equal(better.v, child.v)


def test_sinks_and_soft_caps_take_their_share():
    group = dataclasses.replace(random_heads(2, 2, 6, 4, 7, E=7), sinks=draw(2, 2, seed=5))
    assert group.sinks is not None
    x, where = draw(n, T, 7, seed=1), positions(6, softcap=2.0)
    fit = _Fit(group, group, x, x, where)
    scores = torch.cat(fit.scores)
    capped = (2 * (scores / 2).tanh()).masked_fill(~where.visible, float("-inf")).exp()
    wanted = capped / (capped.sum(-1, keepdim=True) + group.sinks.flatten()[:, None, None].exp())
    torch.testing.assert_close(torch.cat(fit.attention), wanted)
