"""What fits beside the weights, in whole bytes and tokens."""

from __future__ import annotations

import math
from fractions import Fraction

from gqa.config import ModelShape
from gqa.hardware import Device
from gqa.plan.cache import kv_bytes


def cache_budget_bytes(device: Device, utilisation: float, weight_bytes: int) -> int:
    """memory * utilisation - weights, rounded down; negative if the weights alone do not fit."""
    # Through the decimal text, so that 0.9 means nine tenths and no rounding error costs a byte.
    return math.floor(device.memory_bytes * Fraction(str(utilisation))) - weight_bytes


def max_concurrent_requests(shape: ModelShape, context: int, kv_element_bytes: int, budget: int) -> int:
    """Requests of `context` tokens whose caches fit into the budget together."""
    return max(0, budget // kv_bytes(shape, context, 1, kv_element_bytes))


def max_context(shape: ModelShape, batch: int, kv_element_bytes: int, budget: int) -> int | None:
    """The longest context that `batch` requests can have at once; 0 if not even one token fits, and None if there
    is no limit, because every layer slides and the full windows fit."""

    def fits(context: int) -> bool:
        return kv_bytes(shape, context, batch, kv_element_bytes) <= budget

    if not fits(1):
        return 0
    windows = [layer.window for layer in shape.layers if layer.window is not None]
    if len(windows) == len(shape.layers) and fits(max(windows)):
        return None
    low, high = 1, 2  # low fits; the bytes grow with the context, so that the last one that fits can be searched
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
