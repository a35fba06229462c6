"""A plan in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gqa.cli import output
from gqa.record import Record
from gqa.units import format_bytes, format_count, format_seconds


def show(record: Record, *, details: bool) -> None:
    model, inputs, settings = record.results["model"], record.inputs, record.results["settings"]
    output.data(_headline(model))
    requests = "1 request" if inputs["batch"] == 1 else f"{inputs['batch']:,} requests"
    device = record.results["device"]
    ranks, on = inputs["tensor_parallel"], f", on {device['name']}" if device else ""
    if ranks > 1:
        on = f", on {ranks} x {device['name']}" if device else f", on {ranks} devices"
    by = "" if inputs["engine"] == "contiguous" else f" of {inputs['engine']}"
    output.data(f"{requests} of {inputs['context']:,} tokens, {inputs['kv_dtype']} cache{by}{on}\n")
    fits = settings[0]["cache_budget_bytes"] is not None
    output.table([_memory(setting, bool(device), fits) for setting in settings])
    if any(setting["is_current"] for setting in settings):
        output.data("* the model as it is")
    if fits and inputs["engine"] != "contiguous":
        _pools(settings, inputs["engine"], inputs["context"])
    if details:
        output.table([_work(setting) for setting in settings], title="\nWork of one step of each request, in FLOPs")
        output.table([_traffic(setting) for setting in settings], title="\nWhat a decode step moves")
        output.table([_training(setting) for setting in settings], title="\nTraining")
    if advice := record.results["recommendation"]:
        word = "Recommended: " if advice["kv_heads"] else ""
        output.data("\n" + textwrap.fill(word + advice["reason"], 100))
    output.data("\nAll figures are predicted by arithmetic, none is measured.")
    for sentence in record.assumptions:
        output.data(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  "))


def _pools(settings: Sequence[Mapping[str, Any]], engine: str, context: int) -> None:
    """What the engine would log about its cache."""
    output.data("")
    for setting in settings:
        if (setting["cache_budget_bytes"] or 0) <= 0:
            continue
        blocks = (
            f"{setting['cache_blocks']:,} blocks of {setting['cache_block_tokens']:,}, "
            if setting["cache_blocks"]
            else ""
        )
        output.data(
            f"{engine} with {setting['label']} KV heads: {format_bytes(setting['cache_budget_bytes'])} for the cache,"
            f" {blocks}{setting['cache_tokens']:,} tokens, {setting['concurrency']:.2f}x {context:,}"
        )


def show_check(record: Record) -> None:
    rows = record.results["figures"]
    output.table(
        [
            {
                "engine": row["engine"],
                "model": row["model"],
                "figure": row["figure"],
                "logged": row["logged"],
                "planned": row["predicted"],
                "": "agrees" if row["agrees"] else "DISAGREES",
                "of the bound": f"{row['efficiency']:.0%}" if row["efficiency"] else "",
            }
            for row in rows
        ]
    )
    wrong = record.results["wrong"]
    output.data(f"\n{len(rows) - wrong} of {len(rows)} logged figures of {record.inputs['cases']} cases agree.")


def _headline(model: Mapping[str, Any]) -> str:
    count = model["kv_heads_label"]
    heads = "latent attention" if count == "latent" else f"{count} KV heads" if count != "none" else "no attention"
    queries = f"{model['query_heads']} query heads, " if model["query_heads"] else ""
    dim = f", head dim {model['head_dim']}" if model["head_dim"] else ""
    return f"{model['name']}: {model['layers']} layers, {queries}{heads}{dim}"


def _memory(setting: Mapping[str, Any], with_device: bool, fits: bool) -> dict[str, str]:
    row = {
        "KV heads": f"{setting['label']}{' *' if setting['is_current'] else ''}",
        "queries each": _known(setting["queries_per_kv_head"], str, "-"),
        "KV per token": format_bytes(setting["kv_bytes_per_token"]),
        "KV cache": format_bytes(setting["kv_bytes"]),
        "of MHA": _share(setting["kv_bytes"], setting["kv_bytes_as_mha"]),
        "KV parameters": _known(setting["kv_projection_parameters"], format_count),
        "weights": _known(setting["weight_bytes"], format_bytes),
    }
    if with_device:
        row["decode at best"] = _known(setting["decode_seconds_bound"], format_seconds)
    if fits:
        row["requests"] = _known(setting["max_concurrent_requests"], "{:,}".format)
        endless = setting["context_unlimited"]
        row["longest context"] = "no limit" if endless else _known(setting["max_context"], "{:,}".format)
    return row


def _work(setting: Mapping[str, Any]) -> dict[str, str]:
    row = {"KV heads": setting["label"]}
    for step in ("decode", "prefill"):
        for part, name in (("projection", "projections"), ("core", "attention core"), ("rest", "rest")):
            row[f"{step}: {name}"] = _known(setting[f"{step}_{part}_flops"], _power)
    return row


def _traffic(setting: Mapping[str, Any]) -> dict[str, str]:
    row = {
        "KV heads": setting["label"],
        "weights": _known(setting["decode_weight_bytes_moved"], format_bytes),
        "cache": format_bytes(setting["decode_kv_bytes_moved"]),
        "cache above weights from": _known(setting["overtaking_context"], "{:,} tokens".format, "never"),
        "or from": _known(setting["overtaking_batch"], "{:,} requests".format, "never"),
    }
    if setting["decode_weight_bytes_moved"] is None:
        row |= {"cache above weights from": "unknown", "or from": "unknown"}
    if setting["decode_seconds_bound"] is not None:
        row["decode held by"] = setting["decode_limit"]
        row["prefill at best"] = format_seconds(setting["prefill_seconds_bound"])
        row["prefill held by"] = setting["prefill_limit"]
    return row


def _training(setting: Mapping[str, Any]) -> dict[str, str]:
    return {
        "KV heads": setting["label"],
        "parameters": _known(setting["parameters"], format_count),
        "states": _known(setting["training_state_bytes"], format_bytes),
        "FLOPs per token": _known(setting["training_flops_per_token"], _power),
    }


def _known(value: Any, text: Callable[[Any], str], unknown: str = "unknown") -> str:
    return unknown if value is None else text(value)


def _power(flops: float) -> str:
    return f"{flops:.3g}"


def _share(part: int, whole: int) -> str:
    if not whole:
        return "-"
    return f"1/{whole // part}" if part and whole % part == 0 else f"{part / whole:.1%}"
