"""Losses as a product of powers: least squares over logarithms, with 95 % intervals of the exponents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def fit_powers(sides: Mapping[str, Sequence[float]], losses: Sequence[float]) -> dict[str, Any] | None:
    """Fit `loss = a * side_1^e_1 * side_2^e_2 ...` to positive numbers; None where the rows are too few for intervals.

    Least squares of log(loss) over the logarithms of the sides. The intervals are Student's, for rows that scatter
    around the trend independently.

    Args:
        sides: by name, the numbers that the loss may depend on, one per row. A side with a single value is left out.
        losses: one per row.

    Returns:
        `rows`, `exponents` (by side: exponent, low, high), `scatter` (standard deviation of log(loss) around the
        trend), `loss_in_the_middle_nats` and `middle` (the sides' geometric means, where the loss has that value).
    """
    sides = {name: values for name, values in sides.items() if len(set(values)) > 1}
    free = len(losses) - len(sides) - 1
    if free < 1 or not sides:
        return None
    logs = np.log(np.array(list(sides.values()), dtype=np.float64).T)
    middle = logs.mean(axis=0)
    plane = np.column_stack([np.ones(len(losses)), logs - middle])
    wanted = np.log(losses)
    best, *_ = np.linalg.lstsq(plane, wanted, rcond=None)
    left = wanted - plane @ best
    variance = left @ left / free
    errors = np.sqrt(variance * np.diag(np.linalg.inv(plane.T @ plane))) * student_quantile(free)
    return {
        "rows": len(losses),
        "exponents": {
            name: {"exponent": float(value), "low": float(value - error), "high": float(value + error)}
            for name, value, error in zip(sides, best[1:], errors[1:], strict=True)
        },
        "scatter": math.sqrt(variance),
        "loss_in_the_middle_nats": float(np.exp(best[0])),
        "middle": {name: float(np.exp(value)) for name, value in zip(sides, middle, strict=True)},
    }


def student_quantile(free: int) -> float:
    """Standard errors to either side of a mean that hold it in 95 % of cases, with `free` degrees of freedom: the
    quantile of Student's distribution, whose integral is taken over the angle atan(t / sqrt(free))."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (free - 1)
    held = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(free) * math.tan(float(np.interp(0.95, held / held[-1], angles)))
