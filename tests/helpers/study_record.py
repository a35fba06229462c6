"""A SYNTHETIC study record for the report's tests: invented figures of a plausible shape, measured by nobody."""

from __future__ import annotations

import copy
from math import log
from typing import Any

from gqa.record import Record

LAYERS, HEADS, HEAD_DIM, BYTES = 6, 8, 32, 4
CONTEXTS = (256, 1024, 4096, 16384)
DEVICES = {"L4": 23034 << 20, "H100 SXM": 81559 << 20, "H200": 143771 << 20}
PARENT = 40.4
CONTROL = 40.9

# perplexity by (stage, method), then KV heads
PERPLEXITY = {
    ("converted", "mean"): {8: 40.4, 4: 62.2, 2: 116.0, 1: 164.0},
    ("converted", "svd"): {8: 40.4, 4: 43.1, 2: 47.5, 1: 57.9},
    ("converted", "svd+refine"): {8: 40.4, 4: 40.7, 2: 41.0, 1: 41.6},
    ("uptrained", "mean"): {4: 45.2, 2: 50.7, 1: 56.1},
    ("uptrained", "svd"): {4: 41.3, 2: 42.6, 1: 44.3},
    ("uptrained", "svd+refine"): {4: 40.3, 2: 40.8, 1: 41.2},
}
GROUPS = {
    8: [[[h] for h in range(8)]] * LAYERS,
    4: [[[0, 3], [1, 2], [4, 7], [5, 6]], [[0, 1], [2, 3], [4, 5], [6, 7]]] * (LAYERS // 2),
    2: [[[0, 2, 5, 7], [1, 3, 4, 6]], [[0, 1, 2, 3], [4, 5, 6, 7]]] * (LAYERS // 2),
    1: [[[0, 1, 2, 3, 4, 5, 6, 7]]] * LAYERS,
}


def quality_rows() -> list[dict[str, Any]]:
    rows = []
    for (stage, method), values in PERPLEXITY.items():
        for heads, perplexity in values.items():
            lost = log(perplexity / PARENT)
            of_mean = log(PERPLEXITY["converted", "mean"][heads] / PARENT)
            rows.append(
                {
                    "kv_heads": heads,
                    "method": method,
                    "stage": stage,
                    "cross_entropy_nats_per_token": log(perplexity),
                    "standard_error_nats": 0.012,
                    "perplexity": perplexity,
                    "kl_to_parent_nats": abs(lost) * 0.8 + 0.001,
                    "top1_agreement": max(0.3, 0.98 - lost),
                    "loss_above_parent_nats": lost,
                    "share_of_mean_loss": lost / of_mean if of_mean else None,
                    "seconds": {"mean": 1.2, "svd": 9.5, "svd+refine": 74.0}[method],
                }
            )
    return rows


def study_results() -> dict[str, Any]:
    per_head = 2 * LAYERS * HEAD_DIM * BYTES
    settings = [
        {
            "kv_heads": heads,
            "queries_per_kv_head": HEADS // heads,
            "kv_bytes_per_token": per_head * heads,
            "kv_bytes_per_token_measured": per_head * heads,
            "kv_cache_saving_ratio": HEADS / heads,
            "attention_parameters": LAYERS * 256 * (2 * 256 + 2 * heads * HEAD_DIM),
            "parameters": 5_300_000 - LAYERS * 256 * 2 * (HEADS - heads) * HEAD_DIM,
        }
        for heads in (8, 4, 2, 1)
    ]
    layers = [
        {
            "kv_heads": heads,
            "method": method,
            "layer": layer,
            "output_error": scale * (HEADS / heads - 0.9) ** 0.6 * (1 + 0.5 * ((layer * 7) % 5)),
            "groups": GROUPS[heads][layer] if method != "mean" else None,
        }
        for heads in (4, 2, 1)
        for method, scale in (("mean", 0.16), ("svd", 0.02), ("svd+refine", 0.003))
        for layer in range(LAYERS)
    ]
    decode = []
    for heads in (8, 4, 2, 1):
        for context in CONTEXTS:
            median = 1.1e-3 + context * heads * 1.4e-7
            decode.append(
                {
                    "kv_heads": heads,
                    "context_tokens": context,
                    "cache_bytes_predicted": per_head * heads * context,
                    "cache_bytes_measured": per_head * heads * context,
                    "seconds_per_token_p20": median * 0.94,
                    "seconds_per_token_p50": median,
                    "seconds_per_token_p80": median * 1.09,
                }
            )
    capacity = [
        {
            "kv_heads": heads,
            "device": device,
            "memory_bytes": memory,
            "max_context_tokens": (memory - 21_200_000) // (per_head * heads),
            "max_concurrent_requests": (memory - 21_200_000) // (per_head * heads * 16384),
            "context_tokens": 16384,
        }
        for heads in (8, 4, 2, 1)
        for device, memory in DEVICES.items()
    ]
    return {
        "parent": {
            "name": "SYNTHETIC stdlib-8h",
            "parameters": 5_300_000,
            "layers": LAYERS,
            "query_heads": HEADS,
            "kv_heads": HEADS,
            "head_dim": HEAD_DIM,
            "train_tokens": 900_000,
            "train_seconds": 171.0,
            "cross_entropy_nats_per_token": log(PARENT),
            "standard_error_nats": 0.012,
            "perplexity": PARENT,
        },
        "control": {
            "train_tokens": 45_000,
            "cross_entropy_nats_per_token": log(CONTROL),
            "standard_error_nats": 0.012,
            "perplexity": CONTROL,
        },
        "settings": settings,
        "quality": quality_rows(),
        "layers": layers,
        "decode": decode,
        "capacity": capacity,
    }


def study_record(**changes: Any) -> Record:
    """The synthetic study; `changes` replace whole tables or objects of its results (None removes one)."""
    results = {**study_results(), **copy.deepcopy(changes)}
    return Record(
        command="study",
        inputs={"model": None, "text": [], "tokens": 900_000, "fraction": 0.05, "seed": 0},
        results={name: value for name, value in results.items() if value is not None},
        basis={
            "kv_bytes_per_token": "predicted",
            "kv_bytes_per_token_measured": "measured",
            "perplexity": "measured",
            "seconds_per_token_p50": "measured",
            "cache_bytes_measured": "measured",
            "cache_bytes_predicted": "predicted",
            "output_error": "measured",
            "max_context_tokens": "predicted",
            "max_concurrent_requests": "predicted",
        },
        assumptions=("These figures are synthetic.", "Keys and values are stored as fp32."),
        machine={"system": "Linux", "architecture": "x86_64", "processor": "none", "cores": 2, "memory_bytes": 8 << 30},
        versions={"python": "3.11.7", "gqa": "0.1.0", "torch": "2.13.0"},
        created="2026-11-22T12:00:00+00:00",
    )
