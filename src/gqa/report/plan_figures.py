"""The drawn figure of a plan: how caches grow, under what devices leave for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gqa.record import Record
from gqa.report import axes, forms
from gqa.report.chart import Rule, Series, panel
from gqa.report.figures import SHAPES, TALL, Figure
from gqa.report.tables import Table
from gqa.units import format_bytes

_MOST_LINES = 4


def growth(record: Record, stops: Sequence[Mapping[str, Any]]) -> Figure:
    """Bytes of the cache over the context, a line per stop, and the memory of devices."""
    settings = record.results["settings"]
    kept = [settings.index(row) for row in stops]
    dtype = record.inputs["kv_dtype"]
    sizes = {
        (row["stop"], row["context_tokens"]): row["kv_bytes"]
        for row in record.results["what_if"]["caches"]
        if row["kv_dtype"] == dtype
    }
    contexts = record.results["what_if"]["contexts"]
    drawn = sizes.values()
    series = [
        Series(
            forms.heads(stops[place]["kv_heads"]),
            f"var(--kv{place})",
            SHAPES[place % len(SHAPES)],
            path=[(n, sizes[index, n]) for n in contexts],
            hollow=[(n, sizes[index, n]) for n in contexts],
        )
        for place, index in enumerate(kept)
    ]
    devices = _apart(record.results["what_if"]["devices"], max(drawn))
    rules = [
        Rule(f"{row['device']}, {forms.gib(row['memory_bytes'])}", row["memory_bytes"], inside=True) for row in devices
    ]
    up = axes.sizes("KV cache, bytes", [*drawn, *(row["memory_bytes"] for row in devices)])
    across = axes.contexts("context of a request, tokens", contexts if len(contexts) > 1 else [1, contexts[0]])
    first, last = stops[0], stops[-1]
    requests = "one request" if record.inputs["batch"] == 1 else f"{record.inputs['batch']:,} requests"
    engine = record.inputs["engine"]
    laid = "in a contiguous cache" if engine == "contiguous" else f"as {engine} lays them out"
    table = Table(
        ["context, tokens", *(forms.heads(row["kv_heads"]) for row in stops)],
        [[f"{n:,}", *(format_bytes(sizes[index, n]) for index in kept)] for n in contexts],
    )
    return Figure(
        "growth",
        f"At {forms.tokens(contexts[-1])} tokens the cache is {format_bytes(sizes[kept[0], contexts[-1]])} with"
        f" {forms.heads(first['kv_heads'])} and {format_bytes(sizes[kept[-1], contexts[-1]])} with"
        f" {forms.heads(last['kv_heads'])}",
        f"Bytes that {requests} keep, in {dtype}, {laid}. Dashed lines are whole"
        " memories of devices; the weights take their part of it first.",
        [("", panel(across, up, series, rules, TALL))],
        {"Bytes by context": table},
    )


def _apart(devices: Sequence[Mapping[str, Any]], most: float) -> list[Mapping[str, Any]]:
    """A few devices whose lines do not lie on one another; those that the caches reach first."""
    kept: list[Mapping[str, Any]] = []
    for row in sorted(devices, key=lambda row: row["memory_bytes"]):
        far = all(row["memory_bytes"] > 1.6 * other["memory_bytes"] for other in kept)
        if far and len(kept) < _MOST_LINES and row["memory_bytes"] < 40 * most:
            kept.append(row)
    return kept
