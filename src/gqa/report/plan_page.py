"""The page of a plan: the dial under any of the devices, cache dtypes and contexts that its record holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report import alternatives, dial, forms, tables
from gqa.report.controls import big_number
from gqa.report.page import KV_CACHE, again, document, facts_html, figures_html, opening, section, stop_colors
from gqa.report.plan_figures import growth
from gqa.units import format_bytes, format_count, format_seconds

NO_STUDY = "gqa study measures it"


def render(record: Record) -> str:
    """The page of a record of `gqa plan` made with alternatives; the same record always gives the same page.

    Errors: GqaError when the record is another's, or its model has no dial."""
    if record.command != "plan" or not isinstance(record.results.get("what_if"), Mapping):
        raise GqaError("not the record of a plan with its alternatives", hint="gqa plan MODEL --html page.html")
    stops = [row for row in record.results["settings"] if row["kv_heads"] is not None]
    if not stops:
        name = record.results["model"]["name"]
        raise GqaError(f"{name} has no KV heads to turn, and so no page with a dial", hint="leave out --html")
    view = alternatives.View(record, [record.results["settings"].index(row) for row in stops])
    return document(
        record,
        title=f"GQA plan: {record.results['model']['name']}",
        name=str(record.results["model"]["name"]),
        finding=_finding(record, stops),
        lede=f"{KV_CACHE} What that would save is worked out here for every setting, by arithmetic alone.",
        style=stop_colors(len(stops)),
        opening=opening(_dial(record, stops, view), tables.html(_settings(stops), "Every setting")),
        figures=section("saves", "What fewer KV heads would save", "", figures_html([growth(record, stops)]))
        + alternatives.html(view),
        how="What this follows from",
        method=_method(record),
        dial_data=_data(record, stops, view),
    )


def _finding(record: Record, stops: Sequence[Mapping[str, Any]]) -> str:
    """The page's sentence: the recommendation if one was asked for, else what the dial's ends differ by."""
    advice = record.results["recommendation"]
    if advice and advice["known"]:
        return advice["reason"]
    model, context = record.results["model"], forms.tokens(record.inputs["context"])
    current = next((row for row in stops if row["is_current"]), stops[0])
    few = stops[-1]
    what = f"{model['name']} keeps {format_bytes(current['kv_bytes'])} for {_requests(record)} of {context} tokens"
    if current is few:
        return f"{what}, with {forms.heads(current['kv_heads'])} the least that there can be."
    middle = next((row for row in stops if current["kv_heads"] >= 4 * row["kv_heads"]), few)
    return (
        f"{what}; with {forms.heads(middle['kv_heads'])} instead of {current['kv_heads']} it would be"
        f" {format_bytes(middle['kv_bytes'])}."
    )


def _requests(record: Record) -> str:
    count = record.inputs["batch"]
    return "one request" if count == 1 else f"{count:,} requests"


def _dial(record: Record, stops: Sequence[Mapping[str, Any]], view: alternatives.View) -> str:
    first = next((index for index, row in enumerate(stops) if row["is_current"]), 0)
    advice = record.results["recommendation"]
    if advice and advice["kv_heads"]:
        first = [row["kv_heads"] for row in stops].index(advice["kv_heads"])
    basis = "predicted"
    numbers = [
        big_number("cache per token", "cache", "cache_note", basis, share="cache_share"),
        big_number("requests at once", "requests", "requests_note", basis),
        big_number("decode step at best", "bound", "bound_note", basis, share="bound_share"),
        big_number("quality", "quality", "quality_note", None),
    ]
    queries = record.results["model"]["query_heads"] or stops[0]["kv_heads"] * stops[0]["queries_per_kv_head"]
    return (
        dial.controls(
            [row["kv_heads"] for row in stops], first, queries, numbers, below="", above=alternatives.choices(view)
        )
        + '<p class="note">Every figure here is predicted by arithmetic (<span class="basis"></span>), for'
        f" {_requests(record)}; none is measured. The dial turns with the arrow keys, too; the address of the page"
        " keeps its state.</p>"
    )


def _data(record: Record, stops: Sequence[Mapping[str, Any]], view: alternatives.View) -> dict[str, Any]:
    shown = []
    for index, row in enumerate(stops):
        kv_heads, shared = row["kv_heads"], row["queries_per_kv_head"]
        texts = dial.heads_texts(kv_heads * shared, kv_heads)
        reads = [query // shared for query in range(kv_heads * shared)]
        quality = {"quality": forms.NOT_MEASURED, "quality_note": NO_STUDY}
        if row["is_current"]:
            quality = {"quality": "its own", "quality_note": "the model as it is"}
        shown.append({**texts, "reads": reads, "layers": {}, **quality, "by": view.by(index)})
    return {"gap": forms.NOT_MEASURED, "stops": shown, **view.data()}


def _settings(stops: Sequence[Mapping[str, Any]]) -> tables.Table:
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "queries_per_kv_head": ("query heads per KV head", forms.whole),
        "kv_bytes_per_token": ("cache per token", format_bytes),
        "kv_bytes": ("KV cache", format_bytes),
        "kv_projection_parameters": ("K and V parameters", format_count),
        "weight_bytes": ("weights", format_bytes),
        "decode_seconds_bound": ("decode step at best", format_seconds),
        "prefill_seconds_bound": ("prefill at best", format_seconds),
        "max_concurrent_requests": ("requests at once", forms.whole),
        "max_context": ("longest context", forms.whole),
        "overtaking_context": ("cache above weights from", lambda n: f"{n:,} tokens"),
        "training_state_bytes": ("states in training", format_bytes),
    }
    return tables.rows_table(columns, stops, gap="unknown")


def _method(record: Record) -> str:
    blocks = [("The model", record.results["model"]), ("What was asked", record.inputs), ("Versions", record.versions)]
    if record.results["device"]:
        device = dict(record.results["device"])
        sources = {f"source of {figure}": text for figure, text in device.pop("sources").items()}
        blocks.insert(1, ("The device", device | sources))
    return facts_html(blocks, record.assumptions) + again("plan.json")
