"""Turns: who plays when, what counts, who sits out. No test here depends on how fast anything is."""

import itertools

import pytest

from gqa.bench import timing
from gqa.bench.timing import percentiles, take_turns
from gqa.errors import GqaError


@pytest.fixture
def clock(monkeypatch):
    """Makes time pass only when a contender says so."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_percentiles_are_linear_between_neighbours():
    seconds = percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (seconds.p20, seconds.p50, seconds.p80, seconds.repeats) == (2.0, 3.5, 5.0, 6)
    assert percentiles([7.0]) == timing.Seconds(7.0, 7.0, 7.0, 1)


def test_rounds_alternate_direction_and_warm_up_does_not_count(clock):
    played = []

    def contender(name, seconds):
        def run(turn):
            played.append((name, turn))
            clock(100 if turn == 0 else seconds)

        return run

    timed = take_turns({"a": contender("a", 1), "b": contender("b", 2)}, repeats=2, warm_up=1)
    assert played == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert (timed["a"].p80, timed["b"].p20, timed["a"].repeats) == (1, 2, 2)


def test_what_comes_after_is_not_timed(clock):
    seen = []
    timed = take_turns(
        {"a": lambda _: clock(1)},
        repeats=3,
        warm_up=2,
        after={"a": lambda: clock(50)},
        on_round=seen.append,
    )
    assert timed["a"].p80 == 1
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("seconds", "budget", "rounds"),
    [
        (1, 100, 10),
        (1, 5, 6),  # spends its budget, then sits out
        (1, 1, timing.LEAST_ROUNDS),
        (9, 1, 1),  # a very slow one is content with one
    ],
)
def test_a_contender_sits_out_when_its_budget_is_spent(clock, seconds, budget, rounds):
    timed = take_turns(
        {"slow": lambda _: clock(seconds), "quick": lambda _: clock(1e-3)},
        repeats=10,
        warm_up=0,
        budget_seconds=budget,
    )
    assert timed["slow"].repeats == rounds
    assert timed["quick"].repeats == 10


def test_a_turn_is_told_its_number():
    turns = []
    take_turns({"a": turns.append}, repeats=3, warm_up=2)
    assert turns == list(itertools.islice(itertools.count(), 5))


def test_only_the_last_call_of_a_turn_is_timed(clock):
    calls = []

    def contender(call):
        calls.append(call)
        clock(1 if call % 3 == 2 else 100)

    timed = take_turns({"a": contender}, repeats=2, warm_up=1, run_up=2)
    assert calls == list(range(9))
    assert (timed["a"].p20, timed["a"].p80, timed["a"].repeats) == (1, 1, 2)


def test_refuses_no_repeats():
    with pytest.raises(GqaError, match="repeats must be positive"):
        take_turns({}, repeats=0)
