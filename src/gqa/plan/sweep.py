"""A whole plan: one row of figures per stop of the KV-head dial, as a Record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gqa.config import MAX_TOKENS, ModelShape, check_kv_heads, kv_head_choices
from gqa.errors import GqaError
from gqa.hardware import Device
from gqa.plan.cache import as_multi_head, kv_bytes, kv_bytes_per_token
from gqa.plan.capacity import cache_budget_bytes, max_concurrent_requests, max_context
from gqa.plan.decode import decode_bound
from gqa.plan.parameters import attention_parameters, kv_projection_parameters, total_parameters
from gqa.record import Record
from gqa.units import dtype_bytes

DEFAULT_CONTEXT = 8192  # for a config that does not say how long its contexts may be
DEFAULT_DTYPE = "bf16"
MAX_BATCH = 1 << 32  # far beyond use, and small enough for every figure to be a float


@dataclasses.dataclass(frozen=True)
class Setting:
    """The figures of one stop of the dial; None where the shape does not tell, or where a device is needed.

    Under latent attention, which has no dial, kv_heads and queries_per_kv_head are None.
    max_context is also None where nothing limits it: `context_unlimited` says so.
    """

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
    decode_seconds_bound: float | None
    decode_limit: str | None
    max_concurrent_requests: int | None
    max_context: int | None
    context_unlimited: bool | None


def plan(
    shape: ModelShape,
    *,
    kv_heads: Sequence[int] | None = None,
    context: int | None = None,
    batch: int = 1,
    kv_dtype: str | None = None,
    weight_dtype: str | None = None,
    device: Device | None = None,
    utilisation: float = 0.9,
    ignore_windows: bool = False,
) -> Record:
    """What each number of KV heads would take and give.

    kv_heads:       the stops to look at (default: every divisor of the query heads)
    context, batch: tokens per request and requests (default: the model's longest context, one request)
    kv_dtype:       of the cache (default: the weights' own, else bf16)
    weight_dtype:   of the weights (default: the config's, else bf16; quantised weights stay unknown)
    device:         for the decode bound and for what fits; without one these figures are None
    utilisation:    the share of the device's memory that weights and cache may fill
    ignore_windows: count sliding layers as if they kept all tokens
    Raises GqaError for settings that are not on the dial and for values out of range.
    """
    if not 0 < utilisation <= 1:
        raise GqaError("utilisation is a share of the memory", got=utilisation, allowed="above 0, at most 1")
    for name, value, most in (("batch", batch, MAX_BATCH), ("context", context, MAX_TOKENS)):
        if value is not None and not 1 <= value <= most:
            raise GqaError(f"{name} is out of range", got=value, allowed=f"1 to {most}")
    if shape.is_latent and kv_heads:
        check_kv_heads(shape, kv_heads[0])
    shape = shape.without_windows() if ignore_windows else shape
    job = _Job(
        context=context or shape.context or DEFAULT_CONTEXT,
        batch=batch,
        kv_dtype=kv_dtype or (shape.weight_dtype if shape.weight_dtype in ("fp16", "fp32") else DEFAULT_DTYPE),
        weight_dtype=weight_dtype or shape.weight_dtype or (None if shape.quantised else DEFAULT_DTYPE),
        device=device,
        utilisation=utilisation,
    )
    variants = _variants(shape, kv_heads)
    settings = [job.setting(variant, variant.layers == shape.layers) for variant in variants]
    inputs = dataclasses.asdict(job) | {
        "model": shape.name,
        "kv_heads": [setting.kv_heads for setting in settings],
        "device": device.name if device else None,
        "ignore_windows": ignore_windows,
    }
    results = {
        "model": _facts(shape),
        "device": dataclasses.asdict(device) if device else None,
        "settings": [dataclasses.asdict(setting) for setting in settings],
    }
    basis = {
        field.name: "predicted" for field in dataclasses.fields(Setting) if field.name not in ("kv_heads", "is_current")
    }
    assumptions = _assumptions(shape, job, ignore_windows, settings)
    return Record("plan", inputs=inputs, results=results, basis=basis, assumptions=assumptions)


def fits(record: Record) -> bool:
    """Whether at least one setting of a plan fits on its device: the weights and one request of the context.
    True where no device was given or the size of the weights is unknown."""
    requests = [setting["max_concurrent_requests"] for setting in record.results["settings"]]
    return any(count is None or count > 0 for count in requests)


@dataclasses.dataclass(frozen=True)
class _Job:
    context: int
    batch: int
    kv_dtype: str
    weight_dtype: str | None
    device: Device | None
    utilisation: float

    def setting(self, shape: ModelShape, is_current: bool) -> Setting:
        element = dtype_bytes(self.kv_dtype)
        parameters = total_parameters(shape)
        weight_element = None if self.weight_dtype is None else dtype_bytes(self.weight_dtype)
        weights = None if parameters is None or weight_element is None else parameters * weight_element
        bound = requests = longest = None
        if self.device and weights is not None and weight_element is not None:
            bound = decode_bound(shape, self.context, self.batch, element, weight_element, self.device)
            budget = cache_budget_bytes(self.device, self.utilisation, weights)
            requests = max_concurrent_requests(shape, self.context, element, budget)
            longest = max_context(shape, self.batch, element, budget)
        return Setting(
            kv_heads=None if shape.is_latent else shape.kv_heads,
            queries_per_kv_head=None if shape.is_latent else shape.query_heads // shape.kv_heads,
            is_current=is_current,
            kv_bytes_per_token=kv_bytes_per_token(shape, element),
            kv_bytes=kv_bytes(shape, self.context, self.batch, element),
            kv_bytes_as_mha=kv_bytes(as_multi_head(shape), self.context, self.batch, element),
            attention_parameters=attention_parameters(shape),
            kv_projection_parameters=kv_projection_parameters(shape),
            parameters=parameters,
            weight_bytes=weights,
            decode_seconds_bound=bound.seconds if bound else None,
            decode_limit=bound.limit if bound else None,
            max_concurrent_requests=requests,
            max_context=longest,
            context_unlimited=None if requests is None else longest is None,
        )


def _variants(shape: ModelShape, kv_heads: Sequence[int] | None) -> list[ModelShape]:
    if shape.is_latent:
        return [shape]
    wanted = kv_heads or sorted(kv_head_choices(shape.query_heads), reverse=True)
    for number in wanted:
        check_kv_heads(shape, number)
    return [shape.with_kv_heads(number) for number in dict.fromkeys(wanted)]


def _facts(shape: ModelShape) -> dict[str, Any]:
    first = shape.layers[0]
    windows = [layer.window for layer in shape.layers if layer.window is not None]
    return {
        "name": shape.name,
        "model_type": shape.model_type,
        "attention": "mla" if shape.is_latent else "sliding" if windows else "full",
        "layers": len(shape.layers),
        "sliding_layers": len(windows),
        "window_tokens": windows[0] if windows else None,
        "hidden": shape.hidden,
        "query_heads": first.query_heads,
        "kv_heads": None if shape.is_latent else first.kv_heads,
        "head_dim": first.head_dim,
        "v_head_dim": first.v_head_dim,
        "context_tokens": shape.context,
        "quantised": shape.quantised,
    }


def _assumptions(shape: ModelShape, job: _Job, ignore_windows: bool, settings: list[Setting]) -> tuple[str, ...]:
    said = [f"The cache is {job.kv_dtype} and holds exactly the tokens asked for: no block rounding, no padding."]
    if job.kv_dtype == "int8":
        said.append("The scales of an int8 cache are not counted.")
    if job.weight_dtype is None:
        said.append(
            f"The stored weights are quantised ({shape.quantised}), so their size is unknown: give --weight-dtype."
        )
    elif settings[0].parameters is None:
        said.append(
            f"Model type {shape.model_type!r} or its config does not tell all parameters; what needs them is unknown."
        )
    else:
        stored = shape.weight_dtype or shape.quantised
        note = "" if stored == job.weight_dtype else f" (stored in {stored})" if stored else " (no dtype is told)"
        said.append(f"Weights are counted from the shape in {job.weight_dtype}{note}.")
    if shape.context and job.context > shape.context:
        said.append(f"The model was made for contexts of up to {shape.context:,} tokens; this one is longer.")
    if shape.is_latent:
        said.append(
            "Latent attention has no KV-head dial; as MHA is what its heads would take without the shared latent."
        )
    if ignore_windows:
        said.append("Sliding windows are ignored: every layer keeps every token.")
    elif windows := sorted({layer.window for layer in shape.layers if layer.window is not None}):
        count = sum(layer.window is not None for layer in shape.layers)
        said.append(
            f"{count} of {len(shape.layers)} layers keep at most {', '.join(map(str, windows))} tokens;"
            " the bytes per token are those of a token inside the window."
        )
    if device := job.device:
        said.append(
            f"{device.name}: {device.memory_basis}; {job.utilisation:g} of it for weights and cache. Activations,"
            " the engine's own memory and more than one device are not counted."
        )
        said.append(
            f"The decode bound reads weights and cache once at {device.bandwidth_bytes_per_second / 1e9:g} GB/s and"
            f" computes at {device.flops_per_second / 1e12:g} TFLOP/s ({device.flops_dtype}); no real step is faster."
        )
        room = cache_budget_bytes(device, job.utilisation, 0)
        if any(setting.weight_bytes is not None and setting.weight_bytes > room for setting in settings):
            said.append(f"Where the weights alone do not fit on one {device.name}, its bound is hypothetical.")
        if any(setting.context_unlimited for setting in settings):
            said.append("All layers slide, so that beyond their windows a longer context takes no more memory.")
    if shape.experts:
        said.append("Of the experts, a step reads the number expected if tokens choose evenly.")
    return tuple(said)
