"""What a plan assumes, as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gqa.config import ModelShape
from gqa.plan.capacity import cache_budget_bytes
from gqa.plan.setting import Job, Setting
from gqa.plan.shard import shard
from gqa.units import format_bytes


def assumptions(
    shape: ModelShape, job: Job, settings: Sequence[Setting], *, weight_dtype: str | None, ignore_windows: bool
) -> tuple[str, ...]:
    """The rules that the figures follow and what they leave out, one sentence or two each."""
    said = [*job.engine.rules(shard(shape, job.ranks), job.kv)]
    if job.kv.scale_bytes:
        said.append(f"An {job.kv.name} cache has a scale of {job.kv.scale_bytes} bytes for each token's head, counted.")
    elif job.kv.block > 1:
        said.append(f"A {job.kv.name} cache takes {job.kv.block_bytes} bytes for {job.kv.block} numbers.")
    said += _of_weights(shape, job, settings, weight_dtype)
    if job.ranks > 1:
        said.append(
            f"{job.ranks} devices share every layer: memory is that of one of them, with max(1, KV heads / {job.ranks})"
            " KV heads; bounds add up their bandwidth and compute, and what they say to one another takes no time."
        )
    if shape.context and job.context > shape.context:
        said.append(f"The model was made for contexts of up to {shape.context:,} tokens; this one is longer.")
    said += _of_layers(shape, ignore_windows)
    said += _of_device(job, settings)
    if any(setting.context_unlimited for setting in settings):
        said.append("Where there is no limit, nothing that the model keeps grows once its windows are full.")
    if shape.experts:
        said.append("Of the experts, a step reads the number expected if tokens choose evenly.")
    if settings[0].training_state_bytes is not None:
        said.append(
            "Training: 16 bytes of states per parameter (mixed precision with Adam), and three times the forward's"
            " work per token."
        )
    return tuple(said)


def _of_weights(shape: ModelShape, job: Job, settings: Sequence[Setting], dtype: str | None) -> list[str]:
    if job.weights.stored is not None:
        return [
            f"Weights are the {format_bytes(job.weights.stored.total_bytes)} that are stored; at other settings the K"
            " and V projections in proportion to their heads."
        ]
    if dtype is None:
        return [f"The stored weights are quantised ({shape.quantised}) and their size is unknown: give --weights."]
    if settings[0].parameters is None:
        return [
            f"Model type {shape.model_type!r} or its config does not tell all parameters: give --weights, or a folder"
            " with the checkpoint, for what fits; speed and work stay unknown."
        ]
    stored = shape.weight_dtype or shape.quantised
    note = "" if stored == dtype else f" (stored in {stored})" if stored else " (no dtype is told)"
    return [f"Weights are counted from the shape in {dtype}{note}."]


def _of_layers(shape: ModelShape, ignore_windows: bool) -> list[str]:
    said = []
    count = len(shape.layers)
    if shape.is_latent:
        said.append(
            "Latent attention has no KV-head dial; as MHA is what its heads would take without the shared latent."
        )
    if len({layer.kv_heads for layer in shape.attention}) > 1:
        said.append("Its layers have different KV heads; a stop of the dial gives all of them the same number.")
    if ignore_windows:
        said.append("Windows are ignored: every layer keeps every token.")
    elif windows := sorted({layer.window for layer in shape.layers if layer.window is not None}):
        slides = sum(layer.window is not None for layer in shape.layers)
        said.append(
            f"{slides} of {count} layers keep at most {', '.join(map(str, windows))} tokens;"
            " the bytes per token are those of a token inside the window."
        )
    if states := sum(layer.state is not None for layer in shape.layers):
        said.append(f"{states} of {count} layers keep a constant state, which no KV head shrinks.")
    if shares := sum(layer.shares_cache for layer in shape.layers):
        said.append(f"{shares} of {count} layers read an earlier layer's cache and keep none.")
    if any(layer.index_dim for layer in shape.layers):
        said.append("An indexer's keys are kept beside the latents, of which a step reads only those it selects.")
    return said


def _of_device(job: Job, settings: Sequence[Setting]) -> list[str]:
    said = []
    device = job.device
    kept = f", less {format_bytes(job.reserve_bytes)} kept back" if job.reserve_bytes else ""
    if job.cache_bytes is not None:
        said.append(f"The cache has {format_bytes(job.cache_bytes)} on each device, as told.")
    elif device:
        said.append(
            f"{device.name}: {device.memory_basis}; {job.utilisation:g} of it for weights and cache{kept}."
            + ("" if job.reserve_bytes else " Activations and the engine's own memory are not counted (--reserve).")
        )
    if device and math.isinf(device.bandwidth_bytes_per_second):
        said.append("No bandwidth is told, and so there are no bounds.")
    elif device:
        rate = f"{device.flops_per_second / 1e12:.4g} TFLOP/s ({device.flops_dtype})"
        said.append(
            f"The bounds read weights and cache once at {device.bandwidth_bytes_per_second / 1e9:.4g} GB/s and compute"
            f" at {'any rate (none is told)' if math.isinf(device.flops_per_second) else rate}; no real step is faster."
        )
        if device.flops_dtype.endswith("measured"):
            said.append("The rates were measured just now; other work on the machine makes them worse than they are.")
        room = cache_budget_bytes(device.memory_bytes, job.utilisation, 0)
        if any(setting.weight_bytes is not None and setting.weight_bytes > room for setting in settings):
            said.append(f"Where the weights alone do not fit on one {device.name}, its bound is hypothetical.")
    return said
