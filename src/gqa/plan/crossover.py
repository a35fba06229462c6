"""From where on the cache weighs more than the weights, in what a decode step moves."""

from __future__ import annotations

from collections.abc import Callable

from gqa.config import MAX_TOKENS, ModelShape
from gqa.plan.decode import decode_kv_traffic
from gqa.plan.kv_dtype import KvDtype
from gqa.plan.parameters import read_parameters
from gqa.plan.shard import shard

MAX_BATCH = 1 << 32  # far beyond use, and small enough for every figure to be a float


def overtaking_context(
    shape: ModelShape, batch: int, kv: KvDtype, weight_element_bytes: float, ranks: int = 1
) -> int | None:
    """The shortest context at which B requests' caches are more bytes per step than the weights; None if none is."""
    read, rank = read_parameters(shape, batch), shard(shape, ranks)
    if read is None:
        return None
    weights = read * weight_element_bytes / ranks
    return _first(lambda context: decode_kv_traffic(rank, context, batch, kv) > weights, MAX_TOKENS)


def overtaking_batch(
    shape: ModelShape, context: int, kv: KvDtype, weight_element_bytes: float, ranks: int = 1
) -> int | None:
    """The fewest requests of S tokens at which their caches are more bytes per step than the weights. Of a mixture
    more experts are read the more requests there are, at most all; None if no number of requests is enough."""
    if read_parameters(shape, 1) is None:
        return None
    one = decode_kv_traffic(shard(shape, ranks), context, 1, kv)

    def overtakes(batch: int) -> bool:
        return batch * one > (read_parameters(shape, batch) or 0) * weight_element_bytes / ranks

    return _first(overtakes, MAX_BATCH)


def _first(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 1 to `most` for which a condition holds that stays true once it is."""
    high = 1
    while not holds(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
