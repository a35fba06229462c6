import itertools

import pytest
import torch
from helpers.heads import random_heads, scrambled_copies
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.convert import grouping
from gqa.convert.heads import together


def test_contiguous_groups_are_neighbours():
    assert grouping.contiguous(8, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grouping.contiguous(6, 6) == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize(("heads_count", "groups"), [(8, 2), (8, 4), (12, 3)])
def test_search_finds_the_copies_wherever_they_lie(heads_count, groups):
    r = heads_count // groups
    families = [scrambled_copies(random_heads(1, 2, 6, 6, 24, E=24, seed=10 * g), r, seed=g) for g in range(groups)]
    order = torch.randperm(heads_count, generator=torch.Generator().manual_seed(7))
    shuffled = together(families).select(order.tolist())
    found = grouping.search(shuffled, None, groups, torch.Generator().manual_seed(0))
    family = (order // r).tolist()
    assert sorted(i for group in found for i in group) == list(range(heads_count))
    assert all(len({family[i] for i in group}) == 1 for group in found)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_search_is_as_good_as_trying_every_pairing(seed):
    heads = random_heads(6, 1, 4, 4, 10, E=10, seed=seed)
    losses = grouping.pair_losses(heads, None)
    found = grouping.search(heads, None, 3, torch.Generator().manual_seed(0))

    def loss(groups):
        return sum(float(losses[i, j]) for group in groups for i, j in itertools.combinations(group, 2))

    best = min(loss([p[0:2], p[2:4], p[4:6]]) for p in itertools.permutations(range(6)))
    assert loss(found) == pytest.approx(best)


def test_pair_losses_are_zero_for_copies_only():
    copies = scrambled_copies(random_heads(1, 1, 6, 6, 24, E=24), 2)
    other = random_heads(1, 1, 6, 6, 24, E=24, seed=5)
    heads = together([copies, other])
    losses = grouping.pair_losses(heads, None)
    assert losses[0, 1] < 1e-12
    assert losses[0, 2] > 1e-3
    torch.testing.assert_close(losses, losses.T)
