"""What `gqa bench` measures, as a record."""

# H KV heads · D head dim

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gqa.bench import kernels
from gqa.bench.device import measure_device
from gqa.bench.document import ABOUT_ATTENTION, ABOUT_GENERATION, ABOUT_GPU_ATTENTION, ABOUT_RANDOM_WEIGHTS, record
from gqa.bench.generation import measure_generation
from gqa.bench.problem import Problem
from gqa.progress import Progress, silent
from gqa.record import Record


def bench(
    problems: Sequence[Problem],
    *,
    device: str = "cpu",
    impl: str = "auto",
    model: Any = None,
    random_weights: bool = False,
    contexts: Sequence[int] = (),
    repeats: int = kernels.REPEATS,
    inputs: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> Record:
    """Measure the limits of a device, `gqa.attention` and what torch would do for each problem, and, with a model, its
    tokens per second at each context against transformers' default.

    device: as `gqa.bench.device.choose_device` gives it.
    model: a transformers causal language model on that device; random_weights: say so among the assumptions.
    inputs: what the user asked for, for the record. Raises GqaError like the measurements.
    """
    limits = measure_device(device)
    contenders = {kernels.OURS: kernels.ours(impl), **kernels.TORCH}
    rows = kernels.measure_dial(problems, contenders, limits, repeats=repeats, progress=progress)
    generation = [] if model is None else measure_generation(model, contexts, repeats=repeats, progress=progress)
    assumptions = ABOUT_GPU_ATTENTION if device == "cuda" else ABOUT_ATTENTION
    if model is not None:
        assumptions += ABOUT_GENERATION
    if random_weights:
        assumptions += (ABOUT_RANDOM_WEIGHTS,)
    return record(
        "bench",
        (inputs or {}) | {"device": device, "impl": impl, "repeats": repeats},
        {"machine": dataclasses.asdict(limits.machine), "attention": rows, "generation": generation},
        assumptions,
    )
