"""The figures of one stop of the dial."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gqa.config import ModelShape
from gqa.hardware import Device
from gqa.plan.cache import as_multi_head, kv_bytes_per_token
from gqa.plan.capacity import cache_budget_bytes, max_concurrent_requests, max_context
from gqa.plan.crossover import overtaking_batch, overtaking_context
from gqa.plan.decode import Bound, decode_bound, decode_kv_traffic, prefill_bound
from gqa.plan.engines import Engine
from gqa.plan.flops import decode_work, prefill_work
from gqa.plan.kv_dtype import KvDtype
from gqa.plan.parameters import attention_parameters, kv_projection_parameters, read_parameters, total_parameters
from gqa.plan.shard import shard
from gqa.plan.training import training_flops_per_token, training_state_bytes
from gqa.plan.weights import Weights


@dataclasses.dataclass(frozen=True)
class Setting:
    """One stop of the dial; None where the shape does not tell, or where a device is needed.

    label: the KV heads for the reader; kv_heads and queries_per_kv_head are None where there is no dial, or where
    the layers of the model as it is have different ones. Bytes are those of one device, FLOPs those of the whole model.
    decode_*: one token for each request; prefill_*: all requests' prompts of the context. max_context is that of the
    requests asked for, max_context_alone that of one; both are also None where nothing limits them:
    `context_unlimited` says so. cache_tokens, cache_blocks and concurrency are what the engine's log calls its size,
    and how many requests of the context it holds, a share of the last one included. overtaking_*: from where on a
    decode step moves more cache than weights; None if never.
    """

    label: str
    kv_heads: int | None
    queries_per_kv_head: int | None
    is_current: bool
    kv_bytes_per_token: int
    kv_bytes: int
    kv_bytes_as_mha: int
    attention_parameters: int | None
    kv_projection_parameters: int | None
    parameters: int | None
    weight_bytes: int | None
    decode_projection_flops: int | None
    decode_core_flops: int | None
    decode_rest_flops: int | None
    prefill_projection_flops: int | None
    prefill_core_flops: int | None
    prefill_rest_flops: int | None
    decode_weight_bytes_moved: float | None
    decode_kv_bytes_moved: float
    decode_seconds_bound: float | None
    decode_limit: str | None
    prefill_seconds_bound: float | None
    prefill_limit: str | None
    overtaking_context: int | None
    overtaking_batch: int | None
    cache_budget_bytes: int | None
    cache_tokens: int | None
    cache_blocks: int | None
    cache_block_tokens: int | None
    concurrency: float | None
    max_concurrent_requests: int | None
    max_context: int | None
    max_context_alone: int | None
    context_unlimited: bool | None
    training_state_bytes: int | None
    training_flops_per_token: float | None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked of every setting."""

    context: int
    batch: int
    kv: KvDtype
    weights: Weights
    device: Device | None
    engine: Engine
    utilisation: float
    reserve_bytes: int
    cache_bytes: int | None
    ranks: int

    def setting(self, shape: ModelShape, is_current: bool) -> Setting:
        rank = shard(shape, self.ranks)
        weights = self.weights.of_rank(shape, self.ranks)
        element = self.weights.bytes_per_parameter
        read = read_parameters(shape, self.batch)
        decode, prefill = self._bounds(shape)
        work = self.work(shape) or dict.fromkeys(_WORK)
        heads = {(layer.kv_heads, layer.query_heads) for layer in shape.attention}
        one = next(iter(heads)) if len(heads) == 1 and not shape.is_latent else (None, 0)
        return Setting(
            label=label(shape),
            kv_heads=one[0],
            queries_per_kv_head=one[1] // one[0] if one[0] else None,
            is_current=is_current,
            kv_bytes_per_token=kv_bytes_per_token(rank, self.kv),
            kv_bytes=self.cache_bytes_of(shape),
            kv_bytes_as_mha=self.cache_bytes_of(as_multi_head(shape)),
            attention_parameters=attention_parameters(shape),
            kv_projection_parameters=kv_projection_parameters(shape),
            parameters=total_parameters(shape),
            weight_bytes=None if weights is None else round(weights),
            **work,
            decode_weight_bytes_moved=None if read is None or element is None else read * element / self.ranks,
            decode_kv_bytes_moved=decode_kv_traffic(rank, self.context, self.batch, self.kv),
            decode_seconds_bound=decode and decode.seconds,
            decode_limit=decode and decode.limit,
            prefill_seconds_bound=prefill and prefill.seconds,
            prefill_limit=prefill and prefill.limit,
            overtaking_context=None
            if element is None
            else overtaking_context(shape, self.batch, self.kv, element, self.ranks),
            overtaking_batch=None
            if element is None
            else overtaking_batch(shape, self.context, self.kv, element, self.ranks),
            **self._capacity(rank, weights),
            training_state_bytes=training_state_bytes(shape),
            training_flops_per_token=training_flops_per_token(shape, self.context),
        )

    def cache_bytes_of(self, shape: ModelShape) -> int:
        """Of all requests, on one device."""
        return self.engine.bytes_for(shard(shape, self.ranks), self.context, self.batch, self.kv)

    def cache(self, shape: ModelShape) -> dict[str, int]:
        """The same, and what each token adds to it."""
        per_token = kv_bytes_per_token(shard(shape, self.ranks), self.kv)
        return {"kv_bytes_per_token": per_token, "kv_bytes": self.cache_bytes_of(shape)}

    def work(self, shape: ModelShape) -> dict[str, int] | None:
        """FLOPs of a decode step and of the prompts, by what does them; None where parameters are unknown."""
        decode, prefill = decode_work(shape, self.context, self.batch), prefill_work(shape, self.context, self.batch)
        if decode is None or prefill is None:
            return None
        return {
            "decode_projection_flops": decode.projections,
            "decode_core_flops": decode.core,
            "decode_rest_flops": decode.rest,
            "prefill_projection_flops": prefill.projections,
            "prefill_core_flops": prefill.core,
            "prefill_rest_flops": prefill.rest,
        }

    def on_device(self, shape: ModelShape) -> dict[str, Any]:
        """What the device decides, in short: what fits and how fast a decode step is at best."""
        bound = self._bounds(shape)[0]
        budget = self._budget(self.weights.of_rank(shape, self.ranks))
        rank = shard(shape, self.ranks)
        return {
            "max_concurrent_requests": None
            if budget is None
            else max_concurrent_requests(self.engine, rank, self.context, self.kv, budget),
            "decode_seconds_bound": bound and bound.seconds,
            "decode_limit": bound and bound.limit,
            "decode_flops_per_byte": bound and bound.flops_per_byte,
            "decode_flops_per_second_bound": bound and bound.flops / bound.seconds,
        }

    def _bounds(self, shape: ModelShape) -> tuple[Bound | None, Bound | None]:
        """Of decoding and of prefilling."""
        element = self.weights.bytes_per_parameter
        if self.device is None or element is None or math.isinf(self.device.bandwidth_bytes_per_second):
            return None, None
        asked = (shape, self.context, self.batch, self.kv, element, self.device, self.ranks)
        return decode_bound(*asked), prefill_bound(*asked)

    def _budget(self, weights: float | None) -> int | None:
        """Bytes for the cache on one device."""
        if self.cache_bytes is not None or self.device is None or weights is None:
            return self.cache_bytes
        return cache_budget_bytes(self.device.memory_bytes, self.utilisation, weights + self.reserve_bytes)

    def _capacity(self, rank: ModelShape, weights: float | None) -> dict[str, Any]:
        budget = self._budget(weights)
        if budget is None:
            names = ("cache_budget_bytes", "cache_tokens", "cache_blocks", "cache_block_tokens", "concurrency")
            names += ("max_concurrent_requests", "max_context", "max_context_alone", "context_unlimited")
            return dict.fromkeys(names)
        pool = self.engine.pool(rank, self.context, budget, self.kv)
        longest = max_context(self.engine, rank, self.batch, self.kv, budget)
        return {
            "cache_budget_bytes": budget,
            "cache_tokens": pool.tokens,
            "cache_blocks": pool.blocks,
            "cache_block_tokens": pool.block_tokens,
            "concurrency": pool.concurrency,
            "max_concurrent_requests": max_concurrent_requests(self.engine, rank, self.context, self.kv, budget),
            "max_context": longest,
            "max_context_alone": max_context(self.engine, rank, 1, self.kv, budget),
            "context_unlimited": longest is None,
        }


_WORK = [f"{step}_{part}_flops" for step in ("decode", "prefill") for part in ("projection", "core", "rest")]


def label(shape: ModelShape) -> str:
    """The KV heads of a model: `8`, `16 or 4` where layers differ, `latent`, or `none`."""
    if shape.is_latent:
        return "latent"
    found = sorted({layer.kv_heads for layer in shape.attention}, reverse=True)
    return " or ".join(map(str, found)) or "none"
