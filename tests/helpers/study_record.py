"""A SYNTHETIC study record for the report's tests: invented figures of a plausible shape, measured by nobody."""

from __future__ import annotations

import string
from math import exp, log, log2
from typing import Any

from gqa.record import Record

HEAD_DIM, BYTES = 32, 4
CONTEXTS = (256, 1024, 4096, 16384)
DEVICES = {"L4": 23034 << 20, "H100 SXM": 81559 << 20, "H200": 143771 << 20}
PARENT, CONTROL = 40.4, 40.9

# of a map's levels, as gqa.study.patterns writes them
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"

# share of mean pooling's loss that remains, by stage and method
REMAINS = {
    ("converted", "mean"): 1.0,
    ("converted", "svd"): 0.12,
    ("converted", "svd+distill"): 0.02,
    ("uptrained", "mean"): 0.24,
    ("uptrained", "svd"): 0.05,
    ("uptrained", "svd+distill"): -0.004,
}


def study_results(heads: int = 8, layers: int = 6) -> dict[str, Any]:
    """The results of a study of a model with so many heads and layers, over every power of two of KV heads."""
    stops = [heads >> k for k in range(heads.bit_length()) if heads % (heads >> k) == 0]
    per_head = 2 * layers * HEAD_DIM * BYTES
    width = heads * HEAD_DIM
    return {
        "parent": {
            "name": "SYNTHETIC model",
            "parameters": 5_300_000,
            "layers": layers,
            "query_heads": heads,
            "kv_heads": heads,
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
        "settings": [
            {
                "kv_heads": n,
                "queries_per_kv_head": heads // n,
                "kv_bytes_per_token": per_head * n,
                "kv_bytes_per_token_measured": per_head * n,
                "kv_cache_saving_ratio": heads / n,
                "attention_parameters": layers * width * (2 * width + 2 * n * HEAD_DIM),
                "parameters": 5_300_000 - layers * width * 2 * (heads - n) * HEAD_DIM,
            }
            for n in stops
        ],
        "quality": [
            {
                "kv_heads": heads,
                "method": "parent",
                "stage": "converted",
                "cross_entropy_nats_per_token": log(PARENT),
                "perplexity": PARENT,
            },
            *(_quality(n, heads, method, stage) for (stage, method) in REMAINS for n in stops[1:]),
        ],
        "gradients": [
            {
                "weights": weights,
                "projection": projection,
                "queries_per_kv_head": heads // n,
                "norm_ratio": (heads / n) ** power,
                "norm_ratio_low": 0.95 * (heads / n) ** power,
                "norm_ratio_high": 1.05 * (heads / n) ** power,
            }
            for weights, projection, power in (
                *(("random", "k", 0.51), ("random", "v", 0.5)),
                *(("trained", "k", 0.4), ("trained", "v", 0.7)),
            )
            for n in stops
        ],
        "gradient_exponents": [
            {
                "weights": weights,
                "projection": "k",
                "exponent": exponent,
                "exponent_low": exponent - 0.02,
                "exponent_high": exponent + 0.02,
                "samples": 100,
            }
            for weights, exponent in (("random", 0.51), ("trained", 0.4))
        ],
        "layers": [
            {
                "kv_heads": n,
                "method": method,
                "layer": layer,
                "hidden_error": scale * log2(heads / n) ** 0.6 * (1 + 0.5 * ((layer * 7) % 5)),
                "groups": _groups(heads, n, searched=layer % 2 == 0) if method != "mean" else None,
            }
            for n in stops[1:]
            for method, scale in (("mean", 0.16), ("svd", 0.02), ("svd+distill", 0.003))
            for layer in range(layers)
        ],
        "decode": [
            {
                "kv_heads": n,
                "context_tokens": context,
                "cache_bytes_predicted": per_head * n * context,
                "cache_bytes_measured": per_head * n * context,
                "seconds_per_token_p20": 0.94 * (1.1e-3 + context * n * 1.4e-7),
                "seconds_per_token_p50": 1.1e-3 + context * n * 1.4e-7,
                "seconds_per_token_p80": 1.09 * (1.1e-3 + context * n * 1.4e-7),
            }
            for n in stops
            for context in CONTEXTS
        ],
        "capacity": [
            {
                "kv_heads": n,
                "device": device,
                "memory_bytes": memory,
                "max_context_tokens": (memory - 21_200_000) // (per_head * n),
                "max_concurrent_requests": (memory - 21_200_000) // (per_head * n * 16384),
                "context_tokens": 16384,
            }
            for n in stops
            for device, memory in DEVICES.items()
        ],
        **_attention(heads, stops, layers),
    }


def study_record(results: dict[str, Any] | None = None, **changes: Any) -> Record:
    """The synthetic study; `changes` replace whole tables or objects of its results, None takes one out."""
    merged = {**(study_results() if results is None else results), **changes}
    return Record(
        command="study",
        inputs={"model": None, "text": [], "tokens": 900_000, "fraction": 0.05, "seed": 0},
        results={name: value for name, value in merged.items() if value is not None},
        basis={
            "kv_bytes_per_token": "predicted",
            "kv_bytes_per_token_measured": "measured",
            "perplexity": "measured",
            "seconds_per_token_p50": "measured",
            "cache_bytes_measured": "measured",
            "cache_bytes_predicted": "predicted",
            "hidden_error": "measured",
            "max_context_tokens": "predicted",
            "max_concurrent_requests": "predicted",
        },
        assumptions=("These figures are synthetic.", "Keys and values are stored as fp32."),
        machine={"system": "Linux", "architecture": "x86_64", "processor": "none", "cores": 2, "memory_bytes": 8 << 30},
        versions={"python": "3.11.7", "gqa": "0.1.0", "torch": "2.13.0"},
        created="2026-11-22T12:00:00+00:00",
    )


def _quality(kv_heads: int, heads: int, method: str, stage: str) -> dict[str, Any]:
    of_mean = 0.47 * log2(heads / kv_heads)
    lost = of_mean * REMAINS[stage, method]
    return {
        "kv_heads": kv_heads,
        "method": method,
        "stage": stage,
        "cross_entropy_nats_per_token": log(PARENT) + lost,
        "standard_error_nats": 0.012,
        "perplexity": PARENT * exp(lost),
        "kl_to_parent_nats": abs(lost) * 0.8 + 0.001,
        "top1_agreement": max(0.3, 0.98 - abs(lost)),
        "loss_above_parent_nats": lost,
        "share_of_mean_loss": REMAINS[stage, method],
        "seconds": {"mean": 1.2, "svd": 9.5, "svd+distill": 74.0}[method],
    }


def _attention(heads: int, stops: list[int], layers: int, tokens: int = 9) -> dict[str, Any]:
    """Head n of layer l looks n + l tokens back, those of a random model evenly."""
    models = [("parent", stops[0]), ("random", stops[0]), *(("child", n) for n in stops[1:])]
    drawn = sorted({0, layers // 2, layers - 1})

    def character(weights: str, head: int, layer: int, t: int, s: int) -> str:
        if weights == "random":
            return ALPHABET[round(63 * (1 / (t + 1)) ** 0.5)]
        return ALPHABET[63 if s == max(0, t - (head + layer) % tokens) else 0]

    return {
        "attention_text": {
            "tokens": ["def", " f", "(", "x", "):", "\n    ", "return", " x", "\n"],
            "alphabet": ALPHABET,
        },
        "attention_maps": [
            {
                "weights": weights,
                "kv_heads": n,
                "layer": layer,
                "maps": [
                    "".join(character(weights, head, layer, t, s) for t in range(tokens) for s in range(t + 1))
                    for head in range(heads)
                ],
            }
            for weights, n in models
            for layer in drawn
        ],
        "attention_heads": [
            {
                "weights": weights,
                "kv_heads": n,
                "layer": layer,
                "parent_heads": [head for group in _groups(heads, n, layer % 2 == 0) for head in group],
                "distance_tokens": [1.5 + head for head in range(heads)],
                "entropy_nats": [2.0 / (1 + head) for head in range(heads)],
                "first_share": [0.8 / (1 + head) for head in range(heads)],
                "previous_share": [0.004 * (1 + head) for head in range(heads)],
            }
            for weights, n in models
            for layer in range(layers)
        ],
        "attention_alike": [
            {
                "weights": weights,
                "kv_heads": n,
                "layer": layer,
                "grouping": grouping,
                "within_nats": None if n == heads else scale * (1 + 0.1 * layer),
                "between_nats": None if n == 1 else 0.3,
            }
            for n in stops
            for weights, grouping, scale in (
                *(("parent", "as converted", 0.2), ("parent", "neighbours", 0.26)),
                *(("child", "as converted", 0.12), ("random", "neighbours", 0.001)),
            )
            for layer in range(layers)
            if n < heads or (weights, grouping) == ("parent", "neighbours")
        ],
    }


def _groups(heads: int, kv_heads: int, searched: bool) -> list[list[int]]:
    """Which heads share: neighbours, or (as a search might find) every kv_heads-th."""
    size = heads // kv_heads
    if searched:
        return [list(range(group, heads, kv_heads)) for group in range(kv_heads)]
    return [list(range(group * size, (group + 1) * size)) for group in range(kv_heads)]
