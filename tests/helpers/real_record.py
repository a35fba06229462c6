"""A synthetic record of the proof on a real model; no figure in it was measured."""

from __future__ import annotations

import itertools
import math
from typing import Any

from gqa.record import Record

HALF = "half prose, half the parent's own text"
SIZES = {"32k": 32768, "128k": 131072, "1M": 1048576}
LOSSES = {"parent": 0.0, "mean": 4.2, "procrustes": 1.4, "svd": 0.41, "svd-refined-128k": 0.3}
KINDS = {"prose": 1.0, "code": 1.3, "french": 1.9, "dialogue": 0.8}
PUBLISHED = (
    ("Others 2024 (mean)", 0.5, "after conversion", 300.0),
    ("Others 2024 (aligned)", 0.857, "after conversion", 29.0),
    ("Others 2025", 0.75, "after training", 1.2),
    ("Others 2026", None, "after conversion", None),
)


def losses() -> dict[str, float]:
    """By model; those of the distillations fall with the power -0.3 of their tokens."""
    trained = {}
    for size, tokens in SIZES.items():
        loss = 0.35 * (tokens / 32768) ** -0.3
        trained |= {f"control-{size}": -0.01, f"distilled-{size}": loss, f"distilled-half-own-{size}": 1.1 * loss}
    return LOSSES | trained


def quality_row(name: str, kind: str, window: int) -> dict[str, Any]:
    loss = losses()[name] * KINDS[kind]
    return {
        "name": name,
        "kind": kind,
        "window": window,
        "windows": 32,
        "perplexity": 20 * math.exp(loss),
        "parent_perplexity": 20.0,
        "loss_above_parent_nats": loss,
        "loss_above_parent_standard_error_nats": 0.02 * abs(loss),
        "kl_to_parent_nats": abs(loss) * 0.9,
        "top1_agreement": math.exp(-abs(loss)),
    }


def curve_row(row: dict[str, Any]) -> dict[str, Any]:
    name = row["name"]
    series = "control" if name.startswith("control") else HALF if "half" in name else "prose"
    return {"series": series, "tokens": SIZES[name.rpartition("-")[2]], **row}


def answer_row(name: str, source: str) -> dict[str, Any]:
    share = math.exp(-abs(losses()[name]))
    kept = {"right_answers": 0.6 * share, "parent_right_answers": 0.6, "right_answers_kept": share}
    row = {"name": name, "prompts_from": source, "prompts": 64, "answers_equal": 0.5 * share}
    row |= {"answers_kl_nats": 1 - share, "degenerate_answers": 0.3 * (1 - share), "parent_degenerate_answers": 0.02}
    return row | (kept if source == "questions" else {})


def layer_row(layer: int) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer, "hidden_rms_p50": 1.0 + layer / 5, "hidden_rms_p90": 2.0 + layer / 5}
    row |= {"hidden_rms_max": 950.0 if layer > 11 else 5.0, "largest_token_place": 0}
    for name, part in (("keys", 0.1), ("values", 0.2), ("both", 0.3)):
        row |= {f"{name}_error_p50": part, f"{name}_error_p90": 2 * part, f"{name}_error_of_squares": part / 10}
    return row


def recall_row(name: str, context: int, depth: float) -> dict[str, Any]:
    accuracy = max(0.0, 1 - losses()[name] / 2) * (1 if context < 8192 else 0.7)
    row = {"name": name, "task": "passkey", "context_tokens": context, "depth": depth, "samples": 4}
    return row | {"accuracy": accuracy, "nats_per_answer_token": 1 - accuracy, "nats_without": 4.0}


def real_record() -> Record:
    names = list(losses())
    quality = [quality_row(*cell) for cell in itertools.product(names, KINDS, (256, 2048))]
    trend = {"series": "prose", "figure": "loss_above_parent_nats", "rows": 3, "scatter": 0.0}
    trend |= {"b": 0.3, "b_low": 0.25, "b_high": 0.35, "window": 256}
    published = [
        {
            "work": work,
            "source": "arXiv 0000.00000",
            "model": "SYNTHETIC",
            "plain_gqa": True,
            "cache_saved": saved,
            "stage": stage,
            "training_tokens": 0,
            "metric": "perplexity",
            "parent": 10.0,
            "child": 10.0 * (times or 2.0),
            "times_parent_perplexity": times,
            "differs": "another model",
        }
        for work, saved, stage, times in PUBLISHED
    ]
    children = [name for name in names if name != "parent"]
    made = {
        "seconds": 100.0,
        "seconds_estimate": 90.0,
        "peak_rss_bytes": 2 << 30,
        "peak_memory_bytes_estimate": 3 << 30,
    }
    results = {
        "models": [{"name": name, **({} if name == "parent" else made)} for name in names],
        "quality": quality,
        "answers": [answer_row(name, source) for name in children for source in ("own", "questions")],
        "recall": [recall_row(*cell) for cell in itertools.product(names, (512, 2048, 8192), (0.0, 0.5, 1.0))],
        "curve": [curve_row(row) for row in quality if row["name"].startswith(("control", "distilled"))],
        "trends": [{**trend, "kind": kind, "a": 0.35 * part * 32768**0.3} for kind, part in KINDS.items()],
        "published": published,
        "texts": [{"name": "prose-test", "source": "SYNTHETIC", "sha256": "0" * 64}],
        "diagnosis": {"rows": [layer_row(layer) for layer in range(30)]},
        "missing": ["answers on questions.jsonl: no such file"],
    }
    inputs = {"model": "SYNTHETIC", "kv_heads_parent": 3, "kv_heads": 1}
    return Record("benchmark quality on a real model", inputs, results, {}, ("Synthetic.",))
