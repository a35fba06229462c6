"""Contenders timed in turns, so that a slow moment of the machine falls on all of them alike."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gqa.errors import GqaError

WARM_UP_ROUNDS = 2
LEAST_ROUNDS = 3

# Runs something and tells the seconds it took.
Clock = Callable[[Callable[[], object]], float]


def host_clock(run: Callable[[], object]) -> float:
    """Seconds until `run` returns, for what is done by then."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True, slots=True)
class Seconds:
    """Percentiles over `repeats` timed runs, in seconds."""

    p20: float
    p50: float
    p80: float
    repeats: int

    def each_of(self, calls: int) -> Seconds:
        """The time of one of the equal calls that a timed run was made of."""
        return dataclasses.replace(self, p20=self.p20 / calls, p50=self.p50 / calls, p80=self.p80 / calls)


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What a contender does in its turn.

    run:   told the number of the run; it makes `calls` equal calls
    found: what the last call of a run left, where it can be told
    """

    run: Callable[[int], object]
    calls: int = 1
    found: Callable[[], Any] | None = None


def percentiles(seconds: Sequence[float]) -> Seconds:
    """The 20th, 50th and 80th percentile, linear between neighbours."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(points).tolist()
    return Seconds(p20, p50, p80, len(seconds))


def take_turns(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    repeats: int,
    budget_seconds: float | None = None,
    warm_up: int = WARM_UP_ROUNDS,
    run_up: int = 0,
    clock: Clock = host_clock,
    after: Mapping[str, Callable[[], object]] | None = None,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, Seconds]:
    """Run every contender once per round, `repeats` rounds; odd rounds go backwards, so that none always follows the
    same one.

    A contender is called with the number of its call, which counts up from 0, warm-up included.
    run_up: calls right before the one that is timed, each turn: then a contender finds its own threads awake and its
    own code and tables in the caches, as in a loop of its own, and not what the one before left.
    clock: how a run is timed; by default by the host's clock.
    budget_seconds: a contender that has spent this much time sits out the further rounds once it has `LEAST_ROUNDS`,
    or even 1 if it has spent `LEAST_ROUNDS` times as much.
    after: what to do after a contender's turn, outside its time; on_round: told how many timed rounds are done.

    Returns name -> Seconds. Raises GqaError for fewer than 1 repeat.
    """
    if repeats < 1:
        raise GqaError("repeats must be positive", got=repeats, allowed="1 or more")
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    playing = list(contenders)
    for turn in range(warm_up + repeats):
        for name in playing if turn % 2 == 0 else playing[::-1]:
            began = time.perf_counter()
            for call in range(run_up):
                contenders[name](turn * (run_up + 1) + call)
            elapsed = clock(functools.partial(contenders[name], turn * (run_up + 1) + run_up))
            spent[name] += time.perf_counter() - began
            if after and name in after:
                after[name]()
            if turn >= warm_up:
                taken[name].append(elapsed)
        if turn >= warm_up and on_round:
            on_round(turn + 1 - warm_up)
        if budget_seconds is not None:
            playing = [name for name in playing if not _done(len(taken[name]), spent[name], budget_seconds)]
    return {name: percentiles(seconds) for name, seconds in taken.items()}


def _done(rounds: int, spent: float, budget: float) -> bool:
    return (rounds >= LEAST_ROUNDS and spent > budget) or (rounds >= 1 and spent > LEAST_ROUNDS * budget)
