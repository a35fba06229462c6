"""The study's figures: which rows of the record each draws, what its title says, and the table below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gqa.report import axes, forms, words
from gqa.report.bars import Bar, bars
from gqa.report.chart import Frame, Rule, Series, panel
from gqa.report.reading import STAGES, Study, number, points, positive
from gqa.report.tables import Table, rows_table
from gqa.units import format_bytes, format_seconds

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
METHOD_STYLE = {"mean": ("var(--mean)", "square"), "svd": ("var(--svd)", "circle")} | {
    "svd+refine": ("var(--refine)", "triangle-up"),
    "svd+distill": ("var(--refine)", "diamond"),
}
MOST_MEMORY_LINES = 4
TALL = Frame(height=290)
SMALL = Frame(width=330, height=190, left=52, right=92)


@dataclasses.dataclass(frozen=True)
class Figure:
    """panels: (heading, SVG) side by side; tables: title -> the figures that were drawn."""

    key: str
    title: str
    caption: str
    panels: Sequence[tuple[str, str]]
    tables: Mapping[str, Table]


def saving_figures(study: Study) -> list[Figure]:
    """What fewer KV heads save: memory and time."""
    return [figure for figure in (_memory(study), _decode(study)) if figure]


def cost_figures(study: Study) -> list[Figure]:
    """What they cost: perplexity, the share of mean pooling's loss, the error of each layer."""
    return [figure for figure in (_quality(study), _share(study), _layers(study)) if figure]


def gradient_figures(study: Study) -> list[Figure]:
    """How gradients grow with the query heads that share a KV head."""
    rows = [row for row in study.record.results.get("gradients") or () if positive(row, "norm_ratio")]
    panels = []
    for weights, heading in (("random", "random weights"), ("trained", "the parent and its children")):
        drawn = [row for row in rows if row["weights"] == weights]
        if len({row["queries_per_kv_head"] for row in drawn}) > 1:
            panels.append((heading, _growth(drawn)))
    if not panels:
        return []
    told = [
        f"{row['exponent']:.2f} ± {(row['exponent_high'] - row['exponent_low']) / 2:.2f} for W_{row['projection']}"
        f" ({row['weights']})"
        for row in study.record.results.get("gradient_exponents") or ()
    ]
    columns = {
        "weights": ("weights", str),
        "projection": ("of W_", str),
        "queries_per_kv_head": ("query heads per KV head", forms.whole),
        "norm_ratio": ("norm of the gradient, of that at the left", forms.significant),
        "norm_ratio_low": ("from", forms.significant),
        "norm_ratio_high": ("to", forms.significant),
    }
    caption = (
        "Norm of the gradient of a KV head's rows times the norm of these rows (so that scaling K up and Q down changes"
        " nothing), against how many query heads share it; bars are 95 % intervals. If their contributions were"
        " independent and alike it would grow as the grey line, sqrt(G)."
    )
    if told:
        caption += f" Exponents: {', '.join(told)}; sqrt(G) is 0.50."
    title = "The more query heads share a KV head, the larger its gradient"
    return [Figure("gradients", title, caption, panels, {"Growth of gradients": rows_table(columns, rows)})]


def _growth(rows: Sequence[Mapping[str, Any]]) -> str:
    shared = sorted({row["queries_per_kv_head"] for row in rows})
    series = []
    for projection, color, shape in (("k", "var(--svd)", "circle"), ("v", "var(--mean)", "square")):
        own = [row for row in rows if row["projection"] == projection]
        points_of = [(row["queries_per_kv_head"], row["norm_ratio"]) for row in own]
        spreads = [(row["queries_per_kv_head"], row["norm_ratio_low"], row["norm_ratio_high"]) for row in own]
        series.append(Series(f"W_{projection}", color, shape, points=points_of, spreads=spreads))
    root = [(n, (n / shared[0]) ** 0.5) for n in shared]
    series.append(Series("sqrt(G)", "var(--ink-soft)", "cross", path=root))
    values = [value for row in rows for value in (row["norm_ratio_low"], row["norm_ratio_high"])]
    across = axes.powers("query heads that share a KV head", shared, lambda n: f"{n:g}")
    up = axes.powers("norm of the gradient", [1.0, *values, root[-1][1]], lambda n: f"{n:g}×")
    return panel(across, up, series)


def _memory(study: Study) -> Figure | None:
    rates = {n: positive(study.setting(n), "kv_bytes_per_token") for n in study.stops}
    measured = {n: list(points(study.decode_rows(n), "context_tokens", "cache_bytes_measured")) for n in study.stops}
    memory = _apart(study.devices)
    longest = {
        n: [
            (most, rate * most)
            for device in memory
            if rate and (most := positive(study.capacity_row(n, device), "max_context_tokens"))
        ]
        for n, rate in rates.items()
    }
    reach = [a for marks in (*measured.values(), *longest.values()) for a, _ in marks] or [1024, 131072]
    first, last = min(reach), max(reach)
    series = [
        Series(
            forms.heads(n),
            *_stop_style(study, n),
            points=measured[n],
            hollow=longest[n],
            path=[(first, rate * first), (last, rate * last)],
        )
        for n, rate in rates.items()
        if rate
    ]
    if not series:
        return None
    drawn = [b for one in series for _, b in (*one.points, *one.hollow, *one.path)]
    if memory:  # nothing is learned from caches that no device could hold
        drawn = [min(size, 2 * max(memory.values())) for size in drawn]
    across = axes.contexts("context of one request, tokens", [first, last])
    up = axes.sizes("KV cache, bytes", [*drawn, *memory.values()])
    series = [dataclasses.replace(one, path=_below(one.path, up.high)) for one in series]
    rules = [Rule(f"{device}, {forms.gib(size)}", size, inside=True) for device, size in memory.items()]
    caption = "The cache grows with every token, at a rate that the number of KV heads sets. Lines are predicted: "
    caption += "bytes per token times tokens."
    if any(measured.values()):
        caption += " Filled marks are the bytes of the tensors that really lay in memory."
    if memory:
        caption += (
            " Dashed lines are the memory of a device; hollow marks show the longest context that fits on it"
            " beside the weights, for one request."
        )
    return Figure(
        "memory",
        words.memory_title(study),
        caption,
        [("", panel(across, up, series, rules, TALL))],
        _memory_tables(study),
    )


def _memory_tables(study: Study) -> dict[str, Table]:
    heads = {"kv_heads": ("KV heads", forms.whole)}
    rates = heads | {
        "kv_bytes_per_token": ("cache per token predicted, bytes", forms.whole),
        "kv_bytes_per_token_measured": ("measured, bytes", forms.whole),
    }
    caches = heads | {
        "context_tokens": ("context, tokens", forms.whole),
        "cache_bytes_predicted": ("cache predicted, bytes", forms.whole),
        "cache_bytes_measured": ("measured, bytes", forms.whole),
    }
    capacity = heads | {
        "device": ("device", str),
        "memory_bytes": ("memory", format_bytes),
        "max_context_tokens": ("longest context, tokens", forms.whole),
        "max_concurrent_requests": ("requests that fit", forms.whole),
        "context_tokens": ("of tokens each", forms.whole),
    }
    found = {
        "Cache per token": rows_table(rates, study.settings),
        "Cache of one request": rows_table(caches, [row for n in study.stops for row in study.decode_rows(n)]),
        "What fits on a device, predicted": rows_table(capacity, study.capacity),
    }
    return {title: table for title, table in found.items() if table.rows}


def _decode(study: Study) -> Figure | None:
    series = [
        Series(
            forms.heads(n),
            *_stop_style(study, n),
            points=list(points(rows, "context_tokens", "seconds_per_token_p50")),
            spreads=[
                (row["context_tokens"], low, high)
                for row in rows
                if (low := positive(row, "seconds_per_token_p20")) and (high := positive(row, "seconds_per_token_p80"))
            ],
        )
        for n in study.stops
        if (rows := study.decode_rows(n))
    ]
    series = [one for one in series if one.points]
    if not series:
        return None
    across = axes.contexts("context before the token, tokens", [a for one in series for a, _ in one.points])
    seconds = [b for one in series for _, b in one.points] + [
        b for one in series for _, *ends in one.spreads for b in ends
    ]
    caption = (
        "Each new token reads the whole cache once, so the time grows with the context, and fewer KV heads mean less to"
        " read. Marks are medians, measured on this machine; bars reach from the 20th to the 80th percentile."
    )
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "context_tokens": ("context, tokens", forms.whole),
        "seconds_per_token_p20": ("p20", format_seconds),
        "seconds_per_token_p50": ("median", format_seconds),
        "seconds_per_token_p80": ("p80", format_seconds),
    }
    table = rows_table(columns, [row for n in study.stops for row in study.decode_rows(n)])
    drawing = panel(across, axes.times("time per token", seconds), series, frame=TALL)
    return Figure("decode", words.decode_title(study), caption, [("", drawing)], {"Decode time": table})


def _quality(study: Study) -> Figure | None:
    parent, control = positive(study.parent, "perplexity"), positive(study.control, "perplexity")
    drawn: dict[str, list[Series]] = {}
    # At the parent's own heads nothing is converted: every line starts from the parent, or from it trained on.
    starts = {"converted": parent, "uptrained": control}
    for stage in STAGES:
        drawn[stage] = []
        start = [(study.full, level)] if (level := starts[stage]) else []
        for method in study.methods:
            marks = [(n, p) for n in study.stops if (p := study.figure(n, method, stage, "perplexity"))]
            if marks:
                name = f"{words.short_name(method)} {forms.significant(marks[-1][1])}"
                drawn[stage].append(Series(name, *_method_style(method), points=marks, path=[*start, *marks]))
    if not any(drawn.values()):
        return None
    rules = [Rule(f"parent {forms.significant(parent)}", parent, "var(--ink)")] if parent else []
    trained = [Rule(f"control {forms.significant(control)}", control, dash=(2, 3))] if control else []
    values = [b for every in drawn.values() for one in every for _, b in one.points]
    values += [rule.y for rule in rules + trained]
    up = axes.rounded("perplexity, lower is better", values, forms.tick)
    across = axes.head_counts("KV heads", study.stops)
    panels = [
        (words.STAGE_NAMES[stage], panel(across, up, series, rules + (trained if stage == "uptrained" else [])))
        for stage, series in drawn.items()
        if series
    ]
    caption = "Perplexity says among how many equally likely tokens the model hesitates, on text that it never saw. "
    caption += "The parent is the model before conversion."
    if trained and drawn["uptrained"]:
        caption += " The control is the parent itself, trained on for as long as the converted models were."
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "method": ("method", str),
        "stage": ("stage", str),
        "perplexity": ("perplexity", forms.significant),
        "cross_entropy_nats_per_token": ("cross-entropy, nats/token", lambda v: f"{v:.4f}"),
        "standard_error_nats": ("standard error, nats", lambda v: f"{v:.4f}"),
        "loss_above_parent_nats": ("above the parent, nats", lambda v: f"{v:+.4f}"),
        "kl_to_parent_nats": ("KL to the parent, nats", lambda v: f"{v:.4f}"),
        "top1_agreement": ("same first choice", forms.percent),
        "seconds": ("time taken", format_seconds),
    }
    return Figure(
        "quality", words.quality_title(study), caption, panels, {"Quality": rows_table(columns, study.quality)}
    )


def _share(study: Study) -> Figure | None:
    groups = {
        stage: {
            forms.heads(n): [
                Bar(words.short_name(method), share, forms.percent(share), _method_style(method)[0])
                for method in study.methods
                if (share := study.figure(n, method, stage, "share_of_mean_loss")) is not None
            ]
            for n in study.stops
            if n < study.full
        }
        for stage in STAGES
    }
    shares = [bar.value for stage in groups.values() for one in stage.values() for bar in one]
    if not shares:
        return None
    across = axes.linear("share of the loss of mean pooling", [*shares, 1.0], forms.percent_tick)
    panels = [
        (words.STAGE_NAMES[stage], bars(across, {name: rows for name, rows in one.items() if rows}))
        for stage, one in groups.items()
        if any(one.values())
    ]
    caption = (
        "Mean pooling, the published recipe, averages the heads that come to share. What it adds to the cross-entropy"
        " right after conversion counts as 100 % at each setting; the bars say how much of that remains."
        " Below zero the model is better than its parent."
    )
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "method": ("method", str),
        "stage": ("stage", str),
        "share_of_mean_loss": ("share of mean's loss", forms.percent),
        "loss_above_parent_nats": ("above the parent, nats", lambda v: f"{v:+.4f}"),
    }
    rows = [row for row in study.quality if number(row, "share_of_mean_loss") is not None]
    return Figure("share", words.share_title(study), caption, panels, {"Share of the loss": rows_table(columns, rows)})


def _layers(study: Study) -> Figure | None:
    drawn: dict[int, list[Series]] = {}
    for n in study.stops:
        for method in study.methods:
            rows = [row for row in study.layers if (row["kv_heads"], row.get("method")) == (n, method)]
            marks = list(points(rows, "layer", "hidden_error"))
            if marks:
                drawn.setdefault(n, []).append(
                    Series(words.short_name(method), *_method_style(method), points=sorted(marks))
                )
    if not drawn:
        return None
    every = [mark for series in drawn.values() for one in series for mark in one.points]
    up = axes.rounded("squared distance, share", [b for _, b in every], forms.percent_tick)
    across = axes.whole_numbers("layer", [a for a, _ in every])
    panels = [(forms.heads(n), panel(across, up, series, frame=SMALL)) for n, series in drawn.items()]
    caption = (
        "How far the hidden states behind each layer are from the parent's on the calibration text: squared distance"
        " over squared length, mean over tokens. What a layer loses is passed on to those after it. Nothing has been"
        " uptrained yet."
    )
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "method": ("method", str),
        "layer": ("layer", forms.whole),
        "hidden_error": ("relative squared error", lambda v: forms.significant(v, 3)),
    }
    rows = [row for row in study.layers if number(row, "hidden_error") is not None]
    return Figure("layers", words.layers_title(study), caption, panels, {"Error by layer": rows_table(columns, rows)})


def _stop_style(study: Study, kv_heads: int) -> tuple[str, str]:
    index = study.stops.index(kv_heads)
    return f"var(--kv{index})", SHAPES[index % len(SHAPES)]


def _method_style(method: str) -> tuple[str, str]:
    return METHOD_STYLE.get(method, ("var(--ink-soft)", "diamond"))


def _apart(devices: dict[str, float]) -> dict[str, float]:
    """Devices whose memory lines can be told apart on a log axis, at most a few."""
    chosen: dict[str, float] = {}
    for device, memory in devices.items():
        if len(chosen) < MOST_MEMORY_LINES and all(memory >= 2 * size for size in chosen.values()):
            chosen[device] = memory
    return chosen


def _below(path: Sequence[tuple[float, float]], ceiling: float) -> list[tuple[float, float]]:
    """A straight line through the origin, cut where it leaves the panel."""
    first, (a, b) = path[0], path[-1]
    return [first, (a, b) if b <= ceiling else (a * ceiling / b, ceiling)]
