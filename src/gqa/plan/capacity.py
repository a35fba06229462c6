"""What fits beside the weights, in whole bytes and tokens."""

from __future__ import annotations

import math
from fractions import Fraction

from gqa.config import MAX_TOKENS, ModelShape
from gqa.plan.engines import Engine
from gqa.plan.kv_dtype import KvDtype


def cache_budget_bytes(memory_bytes: int, utilisation: float, taken_bytes: float) -> int:
    """memory * utilisation - what weights and all else take, rounded down; negative if that alone does not fit."""
    # Through the decimal text, so that 0.9 means nine tenths and no rounding error costs a byte.
    return math.floor(memory_bytes * Fraction(str(utilisation)) - Fraction(taken_bytes))


def max_concurrent_requests(engine: Engine, shape: ModelShape, context: int, kv: KvDtype, budget: int) -> int:
    """Requests of `context` tokens whose caches the engine holds at once."""
    concurrency = engine.pool(shape, context, budget, kv).concurrency
    return MAX_TOKENS if math.isinf(concurrency) else math.floor(concurrency)


def max_context(engine: Engine, shape: ModelShape, batch: int, kv: KvDtype, budget: int) -> int | None:
    """The longest context that `batch` requests can have at once; 0 if not even one token fits, and None if there
    is no limit, because nothing that the model keeps grows with the context and its windows fit when full."""

    def fits(context: int) -> bool:
        return engine.bytes_for(shape, context, batch, kv) <= budget

    if not fits(1):
        return 0
    if fits(MAX_TOKENS):
        return None
    low, high = 1, 2  # low fits; the bytes grow with the context, so that the last one that fits can be searched
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
