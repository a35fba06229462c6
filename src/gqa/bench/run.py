"""What `gqa bench` measures, as a record."""

# H KV heads · D head dim

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any

from gqa.bench import kernels
from gqa.bench.commit import commit
from gqa.bench.generation import measure_generation
from gqa.bench.machine import measure_limits
from gqa.bench.problem import Problem
from gqa.progress import Progress, silent
from gqa.record import Record, describe_versions

LIBRARIES = ("numba", "llvmlite")

MEASURED: tuple[str, ...] = (
    "seconds_p20",
    "seconds_p50",
    "seconds_p80",
    "fraction_of_roofline",
    "fraction_of_limit",
    "times_of_gqa",
    "read_bytes_per_second",
    "sgemm_flops_per_second",
    "fp32_flops_per_second",
    "error_max",
    "seconds_per_token_p20",
    "seconds_per_token_p50",
    "seconds_per_token_p80",
    "tokens_per_second",
    "cache_bytes_measured",
    "logits_error_rms",
)
PREDICTED: tuple[str, ...] = (
    "kv_bytes",
    "flops",
    "roofline_seconds",
    "limit_seconds",
    "error_max_allowed",
    "logits_error_rms_allowed",
)

ABOUT_ATTENTION = (
    "A time is the median of runs in turns: every contender once, then again; p20 and p80 stand in the record.",
    "The roofline is max(KV bytes / read bandwidth, FLOPs / rate of torch's sgemm), measured in the same turns; the"
    " limit is the same with the fastest fp32 matrix product there is on this machine.",
    "Every contender was right first: checked against float64. K and V were in no cache unless the record says so.",
)
ABOUT_GENERATION = (
    "Batch 1, one token at a time behind a cache of random keys and values, on which time does not depend.",
    "The default is transformers' attention with its DynamicCache; our logits are as close to those of a wider dtype.",
)
ABOUT_RANDOM_WEIGHTS = "The model's weights are random and it has fewer layers: its time is right, its words are not."


def bench(
    problems: Sequence[Problem],
    *,
    impl: str = "auto",
    model: Any = None,
    random_weights: bool = False,
    contexts: Sequence[int] = (),
    repeats: int = kernels.REPEATS,
    inputs: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> Record:
    """Measure this machine's limits, `gqa.attention` and what torch would do for each problem, and, with a model, its
    tokens per second at each context against transformers' default.

    model: a transformers causal language model on the CPU; random_weights: say so among the assumptions.
    inputs: what the user asked for, for the record. Raises GqaError like the measurements.
    """
    limits = measure_limits()
    contenders = {kernels.OURS: kernels.ours(impl), **kernels.TORCH}
    rows = kernels.measure_dial(problems, contenders, limits, repeats=repeats, progress=progress)
    generation = [] if model is None else measure_generation(model, contexts, repeats=repeats, progress=progress)
    assumptions = ABOUT_ATTENTION
    if model is not None:
        assumptions += ABOUT_GENERATION
    if random_weights:
        assumptions += (ABOUT_RANDOM_WEIGHTS,)
    return record(
        "bench",
        (inputs or {}) | {"impl": impl, "repeats": repeats},
        {"machine": dataclasses.asdict(limits.machine), "attention": rows, "generation": generation},
        assumptions,
    )


def record(
    command: str,
    inputs: dict[str, Any],
    results: dict[str, Any],
    assumptions: Iterable[str],
    libraries: Iterable[str] = (),
) -> Record:
    """A record of measurements, with the commit and the versions of these libraries beside the usual ones."""
    basis: dict[str, str] = dict.fromkeys(MEASURED, "measured") | dict.fromkeys(PREDICTED, "predicted")
    versions = describe_versions()
    for name in (*LIBRARIES, *libraries):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Record(command, inputs | {"commit": commit()}, results, basis, tuple(assumptions), versions=versions)
