"""Axes, and names that are kept apart."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa.report import axes
from gqa.report.chart import Rule, Series, panel, spread

positive = st.floats(1e-6, 1e12)


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=8), st.floats(1, 20))
def test_spread_keeps_order_and_distance(wanted: list[float], gap: float) -> None:
    low, high = 0.0, 200.0
    places = spread(wanted, gap, low, high)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for i, j in pairwise(order):
        assert places[j] - places[i] >= gap - 1e-9
    assert min(places) >= low
    assert max(places) <= high + 1e-9


def test_spread_leaves_alone_what_does_not_touch() -> None:
    assert spread([90, 10, 50], 15, 0, 100) == [90, 10, 50]


@given(st.lists(positive, min_size=1, max_size=6))
def test_ticks_lie_on_the_axis_and_the_values_too(values: list[float]) -> None:
    made = [
        axes.rounded("", values, str),
        axes.linear("", values, str),
        axes.sizes("", values),
        axes.times("", values),
    ]
    for axis in made:
        assert 0 < len(axis.ticks) <= 12
        for value in [*values, *axis.ticks]:
            assert -1e-9 <= axis.place(value) <= 1 + 1e-9


def test_dial_order_on_the_axis_of_heads() -> None:
    axis = axes.head_counts("KV heads", [8, 4, 2, 1])
    assert [axis.place(n) for n in (8, 4, 2, 1)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_contexts_are_told_in_powers_of_two() -> None:
    assert list(axes.contexts("", [256, 16384]).ticks.values()) == ["256", "1k", "4k", "16k"]


def test_perplexities_get_round_ticks() -> None:
    assert all(tick == round(tick) for tick in axes.rounded("", [40.4, 164], str).ticks)
    assert len(axes.rounded("", [40.4, 41.6], str).ticks) >= 3


def test_panel_names_each_line_and_takes_colours_from_the_page() -> None:
    x, y = axes.contexts("tokens", [1, 8]), axes.sizes("bytes", [1, 8])
    series = [Series(name, f"var(--kv{i})", "circle", points=[(1, 1 + i), (8, 8)]) for i, name in enumerate("ab")]
    drawn = panel(x, y, series, [Rule("limit <8>", 8, inside=True)])
    assert ">a</text>" in drawn
    assert ">b</text>" in drawn
    assert "limit &lt;8&gt;" in drawn
    assert 'stroke="var(--kv1)"' in drawn
    assert not math.isnan(float(drawn.partition('viewBox="0 0 ')[2].split()[0]))
