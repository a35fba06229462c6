"""The rows of a study's record: figures of the steps, and the planner's beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gqa.config import ModelShape
from gqa.hardware import find_device
from gqa.plan.cache import kv_bytes_per_token
from gqa.plan.kv_dtype import kv_dtype as find_kv_dtype
from gqa.plan.sweep import plan

# Devices whose memory the report draws as limits: a small, a consumer's and a large one.
_DEVICES = ("L4", "RTX 4090", "H100 SXM")

_MEASURED = (
    "cross_entropy_nats_per_token",
    "standard_error_nats",
    "perplexity",
    "kl_to_parent_nats",
    "top1_agreement",
    "loss_above_parent_nats",
    "share_of_mean_loss",
    "seconds",
    "train_seconds",
    "hidden_error",
    "cache_bytes_measured",
    "kv_bytes_per_token_measured",
    "seconds_per_token_p20",
    "seconds_per_token_p50",
    "seconds_per_token_p80",
    "norm_ratio",
    "exponent",
    "distance_tokens",
    "entropy_nats",
    "first_share",
    "previous_share",
    "within_nats",
    "between_nats",
)
_PREDICTED = (
    "kv_bytes_per_token",
    "kv_cache_saving_ratio",
    "attention_parameters",
    "parameters",
    "cache_bytes_predicted",
    "max_context_tokens",
    "max_concurrent_requests",
)
BASIS = {name: "measured" for name in _MEASURED} | {name: "predicted" for name in _PREDICTED}  # noqa: C420


def scores(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What every evaluation has."""
    return {name: figures[name] for name in ("cross_entropy_nats_per_token", "standard_error_nats", "perplexity")}


def quality(
    kv_heads: int,
    method: str,
    stage: str,
    figures: Mapping[str, Any],
    parent: Mapping[str, Any],
    seconds: float | None = None,
) -> dict[str, Any]:
    """One model's quality against its parent's, both evaluated on the same windows."""
    return {
        "kv_heads": kv_heads,
        "method": method,
        "stage": stage,
        **scores(figures),
        "kl_to_parent_nats": figures.get("kl_to_parent_nats"),
        "top1_agreement": figures.get("top1_agreement"),
        "loss_above_parent_nats": figures["cross_entropy_nats_per_token"] - parent["cross_entropy_nats_per_token"],
        "share_of_mean_loss": None,
        "seconds": seconds,
    }


def share_losses(rows: Iterable[dict[str, Any]]) -> None:
    """Fill in share_of_mean_loss: each loss as a share of what `mean` loses at that setting right after conversion."""
    rows = list(rows)
    mean = {r["kv_heads"]: r for r in rows if r["method"] == "mean" and r["stage"] == "converted"}
    for row in rows:
        lost = mean[row["kv_heads"]]["loss_above_parent_nats"] if row["kv_heads"] in mean else 0
        if lost > 0:
            row["share_of_mean_loss"] = row["loss_above_parent_nats"] / lost


def layers(kv_heads: int, method: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Which heads share, layer by layer, and how far the hidden states behind the layer are off."""
    return [
        {"kv_heads": kv_heads, "method": method}
        | {"layer": layer["layer"], "groups": layer["groups"], "hidden_error": layer.get("hidden_error")}
        for layer in report["layers"]
    ]


def setting(shape: ModelShape, kv_heads: int, kv_dtype: str, decode: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a stop of the dial takes, predicted, and the cache as it was measured."""
    child, dtype = shape.with_kv_heads(kv_heads), find_kv_dtype(kv_dtype)
    row = plan(child, kv_heads=[kv_heads], kv_dtype=kv_dtype).results["settings"][0]
    measured = [d["cache_bytes_measured"] / d["context_tokens"] for d in decode if d["kv_heads"] == kv_heads]
    return {
        "kv_heads": kv_heads,
        "queries_per_kv_head": row["queries_per_kv_head"],
        "kv_bytes_per_token": row["kv_bytes_per_token"],
        "kv_bytes_per_token_measured": measured[0] if measured else None,
        "kv_cache_saving_ratio": kv_bytes_per_token(shape, dtype) / kv_bytes_per_token(child, dtype),
        "attention_parameters": row["attention_parameters"],
        "parameters": row["parameters"],
    }


def capacity(shape: ModelShape, stops: Sequence[int], kv_dtype: str, context: int) -> list[dict[str, Any]]:
    """What would fit on a few devices, predicted."""
    rows = []
    for device in map(find_device, _DEVICES):
        planned = plan(shape, kv_heads=stops, context=context, kv_dtype=kv_dtype, device=device)
        for row in planned.results["settings"]:
            rows.append(
                {
                    "kv_heads": row["kv_heads"],
                    "device": device.name,
                    "memory_bytes": device.memory_bytes,
                    "max_context_tokens": row["max_context"],
                    "max_concurrent_requests": row["max_concurrent_requests"],
                    "context_tokens": context,
                }
            )
    return rows


def planned(shape: ModelShape, stops: Sequence[int], kv_dtype: str, context: int) -> dict[str, Any]:
    """The planner's view of the dial under other devices, dtypes and contexts, for the page to choose from."""
    record = plan(shape, kv_heads=stops, context=context, kv_dtype=kv_dtype, alternatives=True)
    return {"inputs": record.inputs, **record.results}


def parent_facts(shape: ModelShape, name: str, training: Mapping[str, Any]) -> dict[str, Any]:
    """Who the parent is."""
    return {
        "name": name,
        "parameters": plan(shape, kv_heads=[shape.kv_heads]).results["settings"][0]["parameters"],
        "layers": len(shape.layers),
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "train_tokens": training.get("train_tokens"),
        "train_seconds": training.get("train_seconds"),
    }
