"""Figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable

from gqa.units import GIB

NOT_MEASURED = "not measured"


def shown(value: float | None, form: Callable[[float], str]) -> str:
    """A figure in its form, or the words for a gap."""
    return NOT_MEASURED if value is None else form(value)


def significant(value: float, digits: int = 3) -> str:
    """164, 41.0, 0.0123 or 12,345: at least so many significant digits, never an exponent unless tiny."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.1e}" if places > 6 else f"{value:,.{max(places, 0)}f}"


def percent(share: float) -> str:
    return f"{significant(100 * share, 2)}\u00a0%"


def whole(value: float) -> str:
    return f"{round(value):,}"


def times(ratio: float) -> str:
    """4×, 2.7×"""
    return f"{ratio:.2g}×" if ratio < 10 and round(ratio, 1) != int(ratio) else f"{ratio:,.0f}×"


def tokens(count: float) -> str:
    """16384 -> 16k and 2097152 -> 2M where that is exact, as model cards count; else all digits."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size:.0f}{unit}"
    return whole(count)


def about(count: float) -> str:
    """A long count as a reader keeps it: 1.9 million."""
    if count >= 10**6:
        return f"{significant(count / 10**6, 2 if count < 10**7 else 3)} million"
    return whole(count)


def gib(size: float) -> str:
    return f"{significant(size / GIB)} GiB"


def tick(value: float) -> str:
    return f"{value:,g}"


def percent_tick(share: float) -> str:
    return f"{100 * share:g} %"


def heads(count: int) -> str:
    return "1 KV head" if count == 1 else f"{count} KV heads"
