"""Letters: r KV heads of a group, G queries per KV head, D, Dv head dims, E inputs, d hidden."""

import dataclasses

import pytest
import torch
from helpers.heads import contributions, random_heads, scores, scrambled_copies
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.convert import merge
from gqa.convert.heads import Heads
from gqa.convert.keys import row_paths
from gqa.weights.layout import Norm

SIZES = [(2, 1, 4, 4, 12), (4, 3, 6, 6, 20), (8, 1, 16, 8, 32), (3, 2, 2, 6, 5)]


def moment_of(x):
    return x.T @ x / len(x)


@pytest.mark.parametrize("method", ["svd", "procrustes"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize(("r", "G", "D", "Dv", "d"), SIZES)
def test_scrambled_copies_merge_without_loss(method, calibrated, r, G, D, Dv, d):
    one = random_heads(1, G, D, Dv, d, E=d + 1)
    group = scrambled_copies(one, r)
    x = torch.randn(9, d + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moment = moment_of(x) if calibrated else None
    merged = merge.METHODS[method](group, moment, torch.Generator())
    assert merged.q.shape == (1, r * G, D, d + 1)
    assert merged.k.shape == (1, D, d + 1)
    assert merged.v.shape == (1, Dv, d + 1)
    assert merged.o.shape == (1, r * G, d, Dv)
    torch.testing.assert_close(scores(merged, x), scores(group, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(contributions(merged, x), contributions(group, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("method", "rows"), [("svd", "invertible"), ("procrustes", "orthogonal")])
@pytest.mark.parametrize("rotary", [0, 2, 6])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_rows_without_rotary_take_more_than_phases(method, rows, rotary, calibrated):
    one = random_heads(1, 2, 10, 4, 20, E=21, rotary=rotary)
    group = scrambled_copies(one, 3, rows=rows)
    x = torch.randn(30, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    merged = merge.METHODS[method](group, moment_of(x) if calibrated else None, torch.Generator())
    assert merged.rotary == rotary
    torch.testing.assert_close(scores(merged, x), scores(group, x), rtol=0, atol=1e-9)


def test_svd_loses_the_least_of_scores_without_rotary():
    """As for values: no other P shared directions keep more of the energy of the queries' products with the keys."""
    group = random_heads(3, 2, 6, 4, 12, E=12, rotary=0)
    x = torch.randn(60, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = scores(group, x)

    def lost(method):
        return float((scores(merge.METHODS[method](group, moment_of(x), torch.Generator()), x) - exact).square().sum())

    assert lost("svd") < min(lost("procrustes"), lost("mean"), lost("first"))
    energy = row_paths(group.q, group.k, moment_of(x))[0]
    gram = merge.value_gram(energy, moment_of(x)).reshape(18, 18)
    assert lost("svd") / len(x) ** 2 == pytest.approx(float(torch.linalg.eigvalsh(gram)[:-6].sum()))


NORMS = [Norm("rms", "head", True), Norm("rms", "width", False), Norm("layer", "head", False)]


def normed_scores(heads, x):
    """Scores with a norm of each head, or of all, between projection and rotary embedding."""

    def through(rows, factors):
        states = rows @ x.T
        if heads.norm.kind == "layer":
            states = states - states.mean(-2, keepdim=True)
        over = -2 if heads.norm.over == "head" else tuple(range(states.ndim - 1))
        return factors[..., None] * states / states.square().mean(over, keepdim=True).sqrt()

    q, k = through(heads.q, heads.q_norm), through(heads.k, heads.k_norm)
    return scores(dataclasses.replace(heads, q=q, k=k), torch.eye(len(x), dtype=torch.float64))


@pytest.mark.parametrize("method", ["svd", "procrustes"])
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{norm.kind}-{norm.over}")
def test_norms_of_keys(norm, method):
    """Turned copies merge without loss where the two factors of a pair are equal, unturned ones wherever."""
    one = random_heads(1, 1, 8, 4, 12, E=12)
    x = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for alike in (True, False) if norm.kind == "rms" else (False,):
        factors = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.5
        factors = torch.cat([factors[:4], factors[:4]]) if alike else factors
        if alike:
            group = scrambled_copies(one, 3)
        else:
            own = random_heads(3, 1, 8, 4, 12, E=12, seed=9)
            group = dataclasses.replace(own, k=one.k.repeat(3, 1, 1), v=one.v.repeat(3, 1, 1))
        group = dataclasses.replace(
            group, norm=norm, q_norm=factors.expand(3, 1, 8).clone(), k_norm=factors.expand(3, 8).clone()
        )
        merged = merge.METHODS[method](group, moment_of(x), torch.Generator())
        torch.testing.assert_close(normed_scores(merged, x), normed_scores(group, x), rtol=0, atol=1e-8)


def test_sinks_stay_with_their_query_heads():
    group = dataclasses.replace(random_heads(4, 2, 4, 4, 8, E=8), sinks=torch.arange(8.0).view(4, 2))
    merged = merge.svd(group.select([2, 0]), None, torch.Generator())
    assert merged.sinks is not None
    assert merged.sinks.tolist() == [[4, 5, 0, 1]]


def test_mean_does_not_undo_the_scrambling():
    group = scrambled_copies(random_heads(1, 1, 8, 8, 16, E=16), 4)
    x = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    merged = merge.mean(group, None, torch.Generator())
    assert (scores(merged, x) - scores(group, x)).abs().max() > 0.1
    assert (contributions(merged, x) - contributions(group, x)).abs().max() > 0.1


@pytest.mark.parametrize("method", [name for name in merge.METHODS if name != "random"])  # that one draws anew
def test_a_group_of_one_keeps_its_function(method):
    group = random_heads(1, 3, 6, 4, 10, E=11)
    x = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    merged = merge.METHODS[method](group, moment_of(x), torch.Generator())
    torch.testing.assert_close(scores(merged, x), scores(group, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(contributions(merged, x), contributions(group, x), rtol=0, atol=1e-9)


@given(r=st.integers(2, 4), G=st.integers(1, 3), half=st.integers(1, 4), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_svd_loses_the_least_value_energy(r, G, half, seed):
    """Eckart and Young: no other shared Dv directions keep more of the energy; others reach at best the same."""
    d = 12
    group = random_heads(r, G, 2 * half, 2 * half, d, E=d, seed=seed)
    x = torch.randn(40, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)
    )
    exact = contributions(group, x)

    def lost(method):
        merged = merge.METHODS[method](group, moment_of(x), torch.Generator())
        return float((contributions(merged, x) - exact).square().sum())

    best = lost("svd")
    for other in ("procrustes", "mean", "first"):
        assert best <= lost(other) * (1 + 1e-9) + 1e-9


def test_svd_value_loss_is_the_discarded_eigenvalues():
    group = random_heads(3, 2, 4, 4, 12, E=12)
    x = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    merged = merge.svd(group, moment_of(x), torch.Generator())
    lost = (contributions(merged, x) - contributions(group, x)).square().sum() / len(x)
    gram = merge.value_gram(merge.value_paths(group)[0], moment_of(x)).reshape(12, 12)
    torch.testing.assert_close(lost, torch.linalg.eigvalsh(gram)[:-4].sum())


def test_svd_keeps_the_size_of_keys_and_values():
    group = random_heads(4, 1, 8, 8, 32, E=32)
    merged = merge.svd(group, None, torch.Generator())
    assert merged.v.square().mean() == pytest.approx(group.v.square().mean().item())
    assert 0.2 < merged.k.square().mean() / group.k.square().mean() < 5


def test_svd_survives_dead_heads():
    group = random_heads(2, 1, 4, 4, 8, E=8)
    dead = Heads(group.q * torch.tensor([0.0, 1.0])[:, None, None, None], group.k, group.v, group.o)
    merged = merge.svd(dead, None, torch.Generator())
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert all(torch.isfinite(t).all() for t in (merged.q, merged.k, merged.v, merged.o))
    torch.testing.assert_close(scores(merged, x)[1], scores(dead, x)[1], rtol=1e-5, atol=1e-5)


def test_random_is_seeded_and_has_the_parents_spread():
    group = random_heads(4, 1, 32, 32, 64, E=64)
    a = merge.random(group, None, torch.Generator().manual_seed(1))
    b = merge.random(group, None, torch.Generator().manual_seed(1))
    assert torch.equal(a.k, b.k)
    assert a.k.std() == pytest.approx(group.k.std().item(), rel=0.1)
