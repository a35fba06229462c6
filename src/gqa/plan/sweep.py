"""A whole plan: one row of figures per stop of the KV-head dial, as a Record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gqa.config import MAX_TOKENS, ModelShape, check_kv_heads
from gqa.errors import GqaError
from gqa.hardware import Device
from gqa.plan.crossover import MAX_BATCH
from gqa.plan.engines import Contiguous, Engine
from gqa.plan.kv_dtype import kv_dtype as find_kv_dtype
from gqa.plan.parameters import kv_projection_parameters, total_parameters
from gqa.plan.recommend import recommend
from gqa.plan.setting import Job, Setting, label
from gqa.plan.weights import Stored, Weights
from gqa.plan.what_if import what_if
from gqa.plan.words import assumptions
from gqa.record import Record
from gqa.units import dtype_bytes

DEFAULT_CONTEXT = 8192  # for a config that does not say how long its contexts may be
DEFAULT_DTYPE = "bf16"
MAX_RANKS = 1 << 16


def plan(
    shape: ModelShape,
    *,
    kv_heads: Sequence[int] | None = None,
    context: int | None = None,
    batch: int = 1,
    requests: int | None = None,
    kv_dtype: str | None = None,
    weight_dtype: str | None = None,
    stored: Stored | None = None,
    device: Device | None = None,
    utilisation: float | None = None,
    reserve: int = 0,
    cache_memory: int | None = None,
    engine: Engine | None = None,
    ranks: int = 1,
    ignore_windows: bool = False,
    alternatives: bool = False,
) -> Record:
    """What each number of KV heads would take and give.

    kv_heads:       the stops to look at (default: every divisor of the query heads)
    context, batch: tokens per request and requests (default: the model's longest context, one request)
    requests:       how many requests must fit: the record then recommends a setting, and batch is this number
    kv_dtype:       of the cache (default: the weights' own, else bf16)
    weight_dtype:   of the weights (default: the config's, else bf16; quantised weights stay unknown)
    stored:         the size of the weights where a checkpoint tells it; weight_dtype then counts nothing
    device:         for the bounds and for what fits; without one these figures are None
    utilisation:    the share of the device's memory for weights and cache (default: the engine's)
    reserve:        bytes of it that neither gets: activations, the engine's own
    cache_memory:   bytes for the cache on each device, where they are known; no device's memory is then divided
    engine:         how the cache is laid out (default: contiguous)
    ranks:          devices that share the model by tensor parallelism; memory figures are those of one of them
    ignore_windows: count sliding and chunked layers as if they kept all tokens
    alternatives:   also what other devices, cache dtypes and contexts would give, for a page
    Raises GqaError for settings that are not on the dial and for values out of range.
    """
    engine = engine or Contiguous()
    utilisation = engine.utilisation if utilisation is None else utilisation
    if not 0 < utilisation <= 1:
        raise GqaError("utilisation is a share of the memory", got=utilisation, allowed="above 0, at most 1")
    for name, value, most in (
        ("batch", batch, MAX_BATCH),
        ("requests", requests, MAX_BATCH),
        ("context", context, MAX_TOKENS),
        ("the number of devices", ranks, MAX_RANKS),
    ):
        if value is not None and not 1 <= value <= most:
            raise GqaError(f"{name} is out of range", got=value, allowed=f"1 to {most}")
    if kv_heads and not shape.dial:
        check_kv_heads(shape, kv_heads[0])
    shape = shape.without_windows() if ignore_windows else shape
    name = weight_dtype or shape.weight_dtype or (None if shape.quantised else DEFAULT_DTYPE)
    job = Job(
        context=context or shape.context or DEFAULT_CONTEXT,
        batch=requests or batch,
        kv=find_kv_dtype(kv_dtype or (shape.weight_dtype if shape.weight_dtype in ("fp16", "fp32") else DEFAULT_DTYPE)),
        weights=Weights(shape, None if name is None else dtype_bytes(name), stored),
        device=device,
        engine=engine,
        utilisation=utilisation,
        reserve_bytes=reserve,
        cache_bytes=cache_memory,
        ranks=ranks,
    )
    variants = _variants(shape, kv_heads)
    settings = [job.setting(variant, variant.layers == shape.layers) for variant in variants]
    inputs = {
        "model": shape.name,
        "context": job.context,
        "batch": job.batch,
        "requests": requests,
        "kv_dtype": job.kv.name,
        "weight_dtype": name,
        "stored_weight_bytes": stored.total_bytes if stored else None,
        "device": device.name if device else None,
        "utilisation": utilisation,
        "reserve_bytes": reserve,
        "cache_memory_bytes": cache_memory,
        "engine": engine.name,
        "tensor_parallel": ranks,
        "kv_heads": [setting.kv_heads for setting in settings],
        "ignore_windows": ignore_windows,
    }
    results: dict[str, Any] = {
        "model": _facts(shape),
        "device": dataclasses.asdict(device) if device else None,
        "settings": [dataclasses.asdict(setting) for setting in settings],
        "recommendation": recommend(settings, job, requests) if requests else None,
        "what_if": what_if(variants, job) if alternatives else None,
    }
    basis = {
        field.name: "predicted"
        for field in dataclasses.fields(Setting)
        if field.name not in ("label", "kv_heads", "is_current")
    }
    said = assumptions(shape, job, settings, weight_dtype=name, ignore_windows=ignore_windows)
    return Record("plan", inputs=inputs, results=results, basis=basis, assumptions=said)


def fits(record: Record) -> bool:
    """Whether at least one setting of a plan fits on its device: the weights and one request of the context, or the
    requests asked for. True where no device was given or the size of the weights is unknown."""
    advice = record.results["recommendation"]
    if advice is not None and advice["known"]:
        return advice["kv_heads"] is not None
    requests = [setting["max_concurrent_requests"] for setting in record.results["settings"]]
    return any(count is None or count > 0 for count in requests)


def kv_projection_share(shape: ModelShape) -> float:
    """The part of all parameters that are K and V projections; 0 where parameters are unknown."""
    kv, total = kv_projection_parameters(shape), total_parameters(shape)
    return kv / total if kv is not None and total else 0.0


def _variants(shape: ModelShape, kv_heads: Sequence[int] | None) -> list[ModelShape]:
    """The model at every stop asked for; as it is where there is no dial, or where its layers differ."""
    if not shape.dial:
        return [shape]
    for number in kv_heads or ():
        check_kv_heads(shape, number)
    stops = [shape.with_kv_heads(n) for n in dict.fromkeys(kv_heads or sorted(shape.dial, reverse=True))]
    unlike = len({layer.kv_heads for layer in shape.attention}) > 1
    return [shape, *stops] if unlike and not kv_heads else stops


def _facts(shape: ModelShape) -> dict[str, Any]:
    attention = shape.attention
    windows = sorted({layer.window for layer in shape.layers if layer.window is not None})
    kinds = {kind: sum(layer.kind == kind for layer in shape.layers) for kind in _KINDS}
    return {
        "name": shape.name,
        "model_type": shape.model_type,
        "attention": " and ".join(kind for kind, count in kinds.items() if count),
        "layers": len(shape.layers),
        "layer_kinds": {kind: count for kind, count in kinds.items() if count},
        "layers_sharing_a_cache": sum(layer.shares_cache for layer in shape.layers),
        "layers_with_a_constant_state": sum(layer.state is not None for layer in shape.layers),
        "sliding_layers": sum(layer.window is not None for layer in shape.layers),
        "window_tokens": windows[0] if len(windows) == 1 else windows or None,
        "hidden": shape.hidden,
        "query_heads": _one(layer.query_heads for layer in attention),
        "kv_heads": None if shape.is_latent else _one(layer.kv_heads for layer in attention),
        "kv_heads_label": label(shape),
        "head_dim": _one(layer.head_dim for layer in attention),
        "v_head_dim": _one(layer.v_head_dim for layer in attention),
        "context_tokens": shape.context,
        "quantised": shape.quantised,
    }


_KINDS = ("full", "sliding", "chunked", "mla", "linear", "none")


def _one(values: Any) -> int | None:
    """The value that all have, None where they differ or there is none."""
    found = set(values)
    return found.pop() if len(found) == 1 else None
