"""Axes with ticks that a reader knows: powers of two for tokens and bytes, round figures for the rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from gqa.report import forms
from gqa.units import format_bytes, format_seconds

ROUND = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
MOST_TICKS = 6


@dataclasses.dataclass(frozen=True)
class Axis:
    """title: with the unit; kind: `log` or `linear`; low, high: the domain; ticks: value -> label."""

    title: str
    kind: str
    low: float
    high: float
    ticks: dict[float, str]
    reverse: bool = False

    def place(self, value: float) -> float:
        """Where a value lies along the axis, 0 at its start and 1 at its end."""
        a, b, v = (
            (math.log(x) for x in (self.low, self.high, value)) if self.kind == "log" else (self.low, self.high, value)
        )
        share = (v - a) / (b - a)
        return 1 - share if self.reverse else share


def powers(title: str, values: Sequence[float], label: Callable[[float], str], unit: float = 1) -> Axis:
    """A log2 axis over positive values, its ticks whole powers of two of `unit`."""
    low = math.floor(math.log2(min(values) / unit))
    high = max(math.ceil(math.log2(max(values) / unit)), low + 1)
    step = math.ceil((high - low + 1) / MOST_TICKS)
    ticks = {unit * 2.0**k: label(unit * 2.0**k) for k in range(low, high + 1, step)}
    return Axis(title, "log", unit * 2.0**low, unit * 2.0**high, ticks)


def contexts(title: str, values: Sequence[float]) -> Axis:
    return powers(title, values, forms.tokens)


def sizes(title: str, values: Sequence[float]) -> Axis:
    return powers(title, values, format_bytes)


def times(title: str, values: Sequence[float]) -> Axis:
    return powers(title, values, format_seconds, unit=1e-3)


def head_counts(title: str, stops: Sequence[int]) -> Axis:
    """log2, turned like the dial: most heads on the left."""
    low, high = min(stops), max(stops)
    return Axis(title, "log", low, max(high, low + 1), {n: str(n) for n in stops}, reverse=True)


def rounded(title: str, values: Sequence[float], label: Callable[[float], str]) -> Axis:
    """A log axis over positive values with round ticks; where they lie close together the ticks are evenly spaced."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.04, 1.002)
    low, high = low / margin, high * margin
    ticks: list[float] = []
    if high / low > 2.5:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        decades = range(first, last + 1, math.ceil((last - first + 1) / MOST_TICKS))
        for figures in ROUND:
            finer = [f * 10.0**d for d in decades for f in figures if low <= f * 10.0**d <= high]
            ticks = finer if len(finer) <= MOST_TICKS else ticks
    else:
        ticks = _even(low, high)
    return Axis(title, "log", low, high, {tick: label(tick) for tick in ticks})


def linear(title: str, values: Sequence[float], label: Callable[[float], str]) -> Axis:
    """A linear axis with zero on it."""
    low, high = min(0.0, *values), max(0.0, *values)
    margin = (high - low) * 0.04 or 1.0
    low, high = (low - margin if low < 0 else 0.0), high + margin
    return Axis(title, "linear", low, high, {tick: label(tick) for tick in _even(low, high)})


def whole_numbers(title: str, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    step = max(1, math.ceil((high - low) / MOST_TICKS))
    return Axis(title, "linear", low, max(high, low + 1), {n: str(n) for n in range(int(low), int(high) + 1, step)})


def _even(low: float, high: float) -> list[float]:
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
