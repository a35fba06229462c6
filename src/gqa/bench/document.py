"""Measurements as a record: which figures were measured, what the reader should know, what was measured with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from gqa.bench.commit import commit
from gqa.record import Record, describe_versions

LIBRARIES = ("numba", "llvmlite", "triton")

SOAK = (
    "sequences",
    "sequences_shared",
    "sequences_at_once",
    "prompt_tokens",
    "new_tokens",
    "steps",
    "steps_with_a_queue",
    "seconds",
    "seconds_of_steps",
    "seconds_alone",
    "texts_equal",
    "texts_near_tie",
    "texts_wrong",
    "near_ties",
    "largest_share_of_allowed_gap",
    "pool_blocks_free",
    "resident_bytes_first_half",
    "resident_bytes_second_half",
)
MEASURED: tuple[str, ...] = (
    "seconds_p20",
    "seconds_p50",
    "seconds_p80",
    "fraction_of_roofline",
    "fraction_of_limit",
    "fraction_of_bound",
    "fraction_of_copy",
    "fraction_of_datasheet",
    "fraction_of_matrix",
    "kv_bytes_per_second",
    "flops_per_second",
    "times_of_gqa",
    "read_bytes_per_second",
    "sgemm_flops_per_second",
    "fp32_flops_per_second",
    "copy_bytes_per_second",
    "matrix_flops_per_second",
    "backward_peak_bytes",
    "backward_extra_bytes",
    "error_max",
    "seconds_per_token_p20",
    "seconds_per_token_p50",
    "seconds_per_token_p80",
    "tokens_per_second",
    "cache_bytes_measured",
    "logits_error_rms",
    "pool_blocks",
    "pool_bytes",
    "sequences_fit",
    "seconds_per_step_p20",
    "seconds_per_step_p50",
    "seconds_per_step_p80",
    "tokens_per_second_each",
    *SOAK,
)
PREDICTED: tuple[str, ...] = (
    "kv_bytes",
    "flops",
    "roofline_seconds",
    "limit_seconds",
    "copy_seconds",
    "datasheet_seconds",
    "matrix_seconds",
    "cache_bytes_predicted",
    "decode_seconds_bound",
    "error_max_allowed",
    "logits_error_rms_allowed",
    "pool_blocks_predicted",
    "sequences_predicted",
    "tokens_per_second_bound",
    "resident_bytes_growth_allowed",
)

ABOUT_ATTENTION = (
    "A time is the median of runs in turns: every contender once, then again; p20 and p80 stand in the record.",
    "The roofline is max(KV bytes / read bandwidth, FLOPs / rate of torch's sgemm), measured in the same turns; the"
    " limit is the same with the fastest fp32 matrix product there is on this machine.",
    "Every contender was right first: checked against float64. K and V were in no cache unless the record says so.",
)
ABOUT_GPU_ATTENTION = (
    "A time is the median of runs in turns: every contender once, then again; p20 and p80 stand in the record. It is"
    " the GPU's own, between two events; decode is replayed from a CUDA graph of several calls.",
    "The limit is max(KV bytes / memory bandwidth, FLOPs / torch.mm's rate in the dtype), measured in the same turns;"
    " the bandwidth is that of a copy, bytes read and written, or of a reduction, whichever is more.",
    "Every contender was right first: checked against float64. K and V were in no cache unless the record says so.",
)
ABOUT_GENERATION = (
    "Batch 1, one token at a time behind a cache of random keys and values, on which time does not depend.",
    "The default is transformers' attention with its DynamicCache; our logits are as close to those of a wider dtype.",
)
ABOUT_DENSITY = (
    "What fits: sequences of the context that a real pool of blocks took before it refused one; the prediction was made"
    " before, by `gqa plan --engine paged`'s rules, and is exact.",
    "All of them then decode one token per step behind random keys and values, on which time does not depend. Weights"
    " and activations come on top of the memory of the cache.",
    "At best: every weight that a step needs and all keys and values, read once at the bandwidth measured here, or the"
    " FLOPs at the rate measured here, whichever takes longer. Nothing of ours is in this bound.",
)
ABOUT_SOAK = (
    "Soak: lengths are drawn evenly over their logarithms. A sequence is admitted when blocks for all its tokens are"
    " free; a quarter begin with the text of a running one and share its blocks.",
    "Every sequence is run again alone, batch 1, in a fresh cache without blocks. A near tie is a place where the two"
    " runs take different tokens whose logits in the next wider dtype are at most 4 times the run alone's error apart.",
    "Memory is the most that lay in RAM after a step, in the first half of the time and since; 64 MiB are what the"
    " system's allocator may keep of what was given back.",
)
ABOUT_RANDOM_WEIGHTS = "The model's weights are random and it has fewer layers: its time is right, its words are not."


def record(
    command: str,
    inputs: dict[str, Any],
    results: dict[str, Any],
    assumptions: Iterable[str],
    libraries: Iterable[str] = (),
) -> Record:
    """A record of measurements, with the commit, unless the inputs tell it, and the versions of these libraries beside
    the usual ones."""
    basis: dict[str, str] = dict.fromkeys(MEASURED, "measured") | dict.fromkeys(PREDICTED, "predicted")
    versions = describe_versions()
    for name in (*LIBRARIES, *libraries):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    inputs = inputs | {"commit": inputs.get("commit") or commit()}
    return Record(command, inputs, results, basis, tuple(assumptions), versions=versions)
