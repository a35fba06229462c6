"""How long a study takes and what memory and disk it wants, told before it begins."""

# N windows of test text · T tokens of a window · V entries of the vocabulary

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gqa.config import parse_config
from gqa.convert.effort import seconds_estimate
from gqa.convert.job import plan_conversion
from gqa.convert.memory import available_bytes, peak_memory_bytes
from gqa.device import default_device
from gqa.evaluate import load_model
from gqa.plan.cache import kv_bytes
from gqa.plan.kv_dtype import kv_dtype
from gqa.source import Source
from gqa.study.corpus import StudyText
from gqa.study.settings import METHODS, Settings, recipe_of

REMEMBERED_BYTES = 1 << 30  # the parent's logits are kept for all children up to here
_BATCH = 8  # windows of an evaluation's or a training's step
_BACKWARD = 2  # times a forward
_WARM_UP = 3  # steps before a decode is timed
_WRITES = 3e8  # bytes a second of a checkpoint written and flushed: a guess
_LIBRARIES_BYTES = 700 << 20  # Python with torch, transformers and numba
_PROBE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """seconds: stage -> what it takes, good to a factor of two; memory_bytes: the peak, on the device where the models
    run; available_bytes: what is free there, None where the system does not tell; disk_bytes: of what is kept."""

    seconds: dict[str, float]
    memory_bytes: int
    available_bytes: int | None
    disk_bytes: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def logits_bytes(windows: int, tokens: int, vocabulary: int) -> int:
    """Of logits (N, T, V) in float32."""
    return windows * tokens * vocabulary * 4


@torch.inference_mode()
def estimate(source: Source, text: StudyText, settings: Settings) -> Estimate:
    """Of a study with every stop named, from a forward pass of the parent that is timed now, arithmetic for the
    conversions, and bytes over a read bandwidth that is timed now for decoding."""
    assert source.folder is not None
    device = default_device()
    shape = parse_config(source.config, source.name)
    test, T = text.test[: settings.test_windows], text.test.shape[1]
    probe = _Probe.of(source.folder, torch.from_numpy(test[:_BATCH]).to(device))
    bandwidth = _read_bandwidth(device)
    weights, vocabulary = probe.weights_bytes, probe.vocabulary
    calibration = text.calibration[: settings.calibration_windows]
    jobs = [
        plan_conversion(source, recipe_of(stop, method, settings, calibration))
        for stop in settings.kv_heads
        for method in METHODS
    ]
    kept = logits_bytes(len(test), T, vocabulary)
    remembered = kept <= REMEMBERED_BYTES
    children = len(jobs)
    trained = children + 1 if settings.uptrain_tokens else 0
    evaluated = children * settings.stages + (1 if trained else 0)
    stored = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    dtype = kv_dtype("fp32" if device == "cpu" else shape.weight_dtype or "fp32")
    decode = sum(
        (settings.decode_repeats + _WARM_UP)
        * (probe.step_seconds + kv_bytes(shape.with_kv_heads(stop), context, 1, dtype) / bandwidth)
        for context in settings.contexts
        for stop in (shape.kv_heads, *settings.kv_heads)
    )
    seconds = {
        "conversion": sum(seconds_estimate(job) or 0.0 for job in jobs) + children * stored / _WRITES,
        "evaluation": test.size * probe.token_seconds * (1 + evaluated * (1 if remembered else 2)),
        "uptraining": settings.uptrain_tokens * probe.token_seconds * (trained * (1 + _BACKWARD) + children),
        "decoding": decode,
    }
    batch = logits_bytes(min(_BATCH, len(test)), T, vocabulary)
    peaks = [2 * weights + 3 * batch + (kept if remembered else batch)]
    peaks += [weights * 2 + max(kv_bytes(shape, context, 1, dtype) for context in settings.contexts)]
    if trained:  # weights, gradients, two moments, and the teacher
        peaks.append(5 * weights + 5 * batch)
    memory = _LIBRARIES_BYTES + max(peaks)
    if device == "cpu":
        memory = max(memory, *(peak_memory_bytes(job, streamed=True) for job in jobs))
    kept_models = len(settings.kv_heads) * settings.stages + (1 if trained else 0)
    return Estimate(seconds, memory, available_bytes(device), (kept_models + 2) * stored)


@dataclasses.dataclass(frozen=True)
class _Probe:
    """What a model's forward pass takes: per token of a batch, and for a token alone."""

    token_seconds: float
    step_seconds: float
    weights_bytes: int
    vocabulary: int

    @classmethod
    def of(cls, folder: Path, ids: torch.Tensor) -> _Probe:
        model = load_model(folder)
        return cls(
            _least(lambda: model(input_ids=ids, use_cache=False).logits.sum().item()) / ids.numel(),
            _least(lambda: model(input_ids=ids[:1, :1], use_cache=False).logits.sum().item()),
            sum(p.numel() * p.element_size() for p in model.parameters()),
            model.config.get_text_config().vocab_size,
        )


def _read_bandwidth(device: str) -> float:
    numbers = torch.ones(_PROBE_BYTES // 4, device=device)
    return _PROBE_BYTES / _least(lambda: numbers.sum().item())


def _least(run: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest run."""
    best = math.inf
    for _ in range(times):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
