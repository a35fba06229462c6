"""A synthetic record of uptraining curves, with every table; no figure in it was measured."""

from __future__ import annotations

import math
from typing import Any

from gqa.record import Record

METHODS = {"svd+refine": 0.01, "svd": 0.02, "procrustes": 0.04, "mean": 0.35, "first": 0.5, "random": 0.45}
ALPHAS = (0.0, 0.01, 0.02, 0.05, 0.1)
LENGTHS = (64, 128, 256, 512)


def spread(kv_heads: int, method: str, alpha: float) -> dict[str, Any]:
    """A loss that training halves every 2 %, more of it with fewer heads, and a few per mille over seeds."""
    lost = 0.0 if method.startswith("control") else METHODS[method] * (3 - kv_heads) * 0.5 ** (50 * alpha)
    row: dict[str, Any] = {"kv_heads": kv_heads, "method": method, "alpha": alpha, "seeds": 3}
    for name, scale in (("perplexity", 80.0), ("times_control", 1.0)):
        mean = scale * math.exp(lost - 0.001)
        row |= {f"{name}_mean": mean, f"{name}_low": 0.997 * mean, f"{name}_high": 1.004 * mean}
        row[f"{name}_deviation"] = 0.003 * mean
    return row


def verdict(kv_heads: int, bound: float) -> dict[str, Any]:
    times = spread(kv_heads, "svd+refine", 0.05)["times_control_mean"]
    told = {
        "times_taught_control_mean": 1.01 * times,
        "times_control_mean": times,
        "within": times <= bound,
        "every_seed_within": times <= bound,
    }
    return {"kv_heads": kv_heads, "method": "svd+refine", "alpha": 0.05, "bound": bound, **told}


def cost(kv_heads: int, teacher: bool) -> dict[str, Any]:
    flops = (1e10 + kv_heads * 1e9) * (4 / 3 if teacher else 1)
    seconds = flops / 2e10
    row = {
        "kv_heads": kv_heads,
        "teacher": teacher,
        "flops_per_step": flops,
        "core_seconds_per_step_predicted": seconds,
    }
    row["core_seconds_per_step_p50"] = 1.02 * seconds
    times = {"p20": 0.97, "p50": 1.0, "p80": 1.1}
    return row | {f"seconds_per_step_{name}": factor * seconds for name, factor in times.items()}


def recall(kv_heads: int, method: str, length: int, depth: float) -> dict[str, Any]:
    found = 1.0 if method == "parent" else max(0.0, 1 - METHODS[method] * length / 512 * (1 + depth))
    row = {"kv_heads": kv_heads, "method": method, "task": "passkey", "context_tokens": length, "depth": depth}
    return row | {"accuracy": found, "nats_per_answer_token": 1.1 - found, "nats_without": 2.3, "samples": 32}


def position(kv_heads: int, method: str, first: int) -> dict[str, Any]:
    above = METHODS.get(method, 0.0) * (1 + math.log2(first) / 10) / kv_heads
    row = {"kv_heads": kv_heads, "method": method, "context_from": first, "context_to": 2 * first - 1}
    row |= {"perplexity": 60 * math.exp(above), "cross_entropy_nats_per_token": math.log(60) + above}
    return row | {"loss_above_parent_nats": above, "loss_above_parent_standard_error_nats": 0.1 * above}


def uptraining_record() -> Record:
    models = [(kv_heads, method) for kv_heads in (2, 1) for method in METHODS]
    children = [(8, "parent"), *((n, method) for n in (4, 2, 1) for method in ("mean", "svd", "svd+refine"))]
    results = {
        "spread": [spread(n, method, a) for n, method in [(8, "control"), *models] for a in ALPHAS],
        "verdict": [verdict(2, 1.01), verdict(1, 1.02)],
        "cost": [cost(n, teacher) for n in (8, 4, 2, 1) for teacher in (False, True)],
        "recall": [recall(*child, length, depth) for child in children for length in LENGTHS for depth in (0.0, 0.5)],
        "recall_parent": {"parameters": 1_000_000, "steps": 700},
        "positions": [position(*child, 2**k) for child in children for k in range(9)],
    }
    return Record("benchmark uptraining", {"parent": "SYNTHETIC"}, results, {}, ("No figure was measured.",))
