"""How fast a step can be at best on a device: the roofline of Williams et al. 2009."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gqa.config import ModelShape
from gqa.hardware import Device
from gqa.plan.cache import kv_bytes, state_bytes
from gqa.plan.flops import Work, decode_work, prefill_work
from gqa.plan.kv_dtype import KvDtype
from gqa.plan.parameters import read_parameters
from gqa.plan.shard import shard


@dataclasses.dataclass(frozen=True)
class Bound:
    """No step is faster than `seconds`; `limit` says what holds it back.

    weight_bytes, kv_bytes, flops: what one device moves and does; flops_per_byte: of both together.
    """

    seconds: float
    limit: Literal["bandwidth", "compute"]
    weight_bytes: float
    kv_bytes: float
    flops: float

    @property
    def bytes_moved(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def flops_per_byte(self) -> float:
        return self.flops / self.bytes_moved


def decode_bound(
    shape: ModelShape,
    context: int,
    batch: int,
    kv: KvDtype,
    weight_element_bytes: float,
    device: Device,
    ranks: int = 1,
) -> Bound | None:
    """max((weights read + B * KV(S)) / bandwidth, FLOPs / peak) for one token of each of B requests.

    The whole cache and every weight that the step needs are read once from device memory; activations, launches and
    the input embedding count nothing. A constant state is read and written. Of `ranks` devices each does its share,
    reads its own copies of KV heads and says nothing to the others. None if the parameters are unknown.
    """
    read, work = read_parameters(shape, batch), decode_work(shape, context, batch)
    if read is None or work is None:
        return None
    cache = decode_kv_traffic(shard(shape, ranks), context, batch, kv)
    return _bound(read * weight_element_bytes, cache, work, device, ranks)


def prefill_bound(
    shape: ModelShape,
    tokens: int,
    batch: int,
    kv: KvDtype,
    weight_element_bytes: float,
    device: Device,
    ranks: int = 1,
) -> Bound | None:
    """The same for the first pass over B prompts of S tokens: every weight is read once, the cache is written once."""
    read, work = read_parameters(shape, batch * tokens), prefill_work(shape, tokens, batch)
    if read is None or work is None:
        return None
    cache = kv_bytes(shard(shape, ranks), tokens, batch, kv)
    return _bound(read * weight_element_bytes, cache, work, device, ranks)


def decode_kv_traffic(shape: ModelShape, context: int, batch: int, kv: KvDtype) -> int:
    """Bytes of cache that one token for each of B requests moves: the cache read once, constant states read and
    written; of latent rows with an indexer, only those it selects."""
    unread = sum(
        count * max(0, context - layer.index_topk) * kv.bytes_of(layer.head_dim, 1)
        for layer, count in shape.counted_layers
        if layer.index_topk and not layer.shares_cache
    )
    return batch * (kv_bytes(shape, context, 1, kv) - unread + state_bytes(shape, kv))


def _bound(weights: float, cache: float, work: Work, device: Device, ranks: int) -> Bound:
    """weights and work: of the whole model; cache: what one device moves."""
    moving = (weights / ranks + cache) / device.bandwidth_bytes_per_second
    computing = work.total / ranks / device.flops_per_second
    return Bound(
        seconds=max(moving, computing),
        limit="bandwidth" if moving >= computing else "compute",
        weight_bytes=weights / ranks,
        kv_bytes=cache,
        flops=work.total / ranks,
    )
