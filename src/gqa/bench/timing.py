"""Contenders timed in turns, so that a slow moment of the machine falls on all of them alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from gqa.errors import GqaError

WARM_UP_ROUNDS = 2
LEAST_ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Seconds:
    """Percentiles over `repeats` timed runs, in seconds."""

    p20: float
    p50: float
    p80: float
    repeats: int


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
    after: Mapping[str, Callable[[], object]] | None = None,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, Seconds]:
    """Run every contender once per round, `repeats` rounds; odd rounds go backwards, so that none always follows the
    same one.

    A contender is called with the number of its call, which counts up from 0, warm-up included.
    run_up: calls right before the one that is timed, each turn: then a contender finds its own threads awake and its
    own code and tables in the caches, as in a loop of its own, and not what the one before left.
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
            start = time.perf_counter()
            contenders[name](turn * (run_up + 1) + run_up)
            end = time.perf_counter()
            elapsed = end - start
            spent[name] += end - began
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
