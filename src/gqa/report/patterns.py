"""What the heads look at: the controls and the frame that patterns.js fills with maps, and figures of all heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from gqa.report import axes, forms
from gqa.report.chart import Frame, Rule, Series, panel
from gqa.report.controls import select
from gqa.report.figures import Figure
from gqa.report.reading import Study, number
from gqa.report.tables import rows_table

_MODELS = {"parent": "the parent", "child": "converted", "random": "random weights"}
_FIGURES = ("distance_tokens", "entropy_nats", "first_share", "previous_share")
# (weights, grouping) -> name, colour and shape of its line
_LINES = {
    ("parent", "as converted"): ("heads that share", "var(--refine)", "triangle-up"),
    ("parent", "neighbours"): ("neighbours", "var(--mean)", "square"),
    ("child", "as converted"): ("converted", "var(--svd)", "circle"),
    ("random", "neighbours"): ("random", "var(--ink-soft)", "diamond"),
}
_FRAME = Frame(right=128)
_TELL = 0.03  # a difference below this share of the figure is called none


def html(study: Study) -> str:
    """The maps with their controls, hidden until the script shows them; empty for a record without whole maps."""
    results = study.record.results
    maps, heads, tokens = _rows(results, "attention_maps"), _rows(results, "attention_heads"), _tokens(results)
    whole = all(_whole_maps(row, study.query_heads, len(tokens)) for row in maps) and all(
        len(_numbers(row.get(name))) == study.query_heads for row in heads for name in ("parent_heads", *_FIGURES)
    )
    if not maps or not tokens or not whole:
        return ""
    models = {f"{row['weights']}|{row['kv_heads']}": _model(row) for row in maps}
    layers = {str(layer): f"layer {layer}" for layer in sorted({row["layer"] for row in maps})}
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in _COLUMNS)
    return f"""<p class="note">Each square is a query head on the start of a test text: a row for the token that asks, a
column for each token before it, the darker (on a dark page: the brighter) the more of its attention goes there. Heads
that read the same KV head stand together. The text below is tinted by what the head last pointed at sees from the
marked token. The maps follow the dial.</p>
<noscript><p class="note">The maps need JavaScript. Their figures are in the tables below.</p></noscript>
<div class="looks" hidden>
<div class="choices"><label>model {select("looks-model", "model", models)}</label>
<label>layer {select("looks-layer", "layer", layers)}</label></div>
<p class="excerpt" id="looks-text"></p>
<p class="asking"><label for="looks-token">the token that asks:</label>
<input type="range" id="looks-token" min="1" max="{len(tokens) - 1}" step="1" value="{len(tokens) * 2 // 3}">
<output for="looks-token" id="looks-asks"></output></p>
<div class="kvs"></div>
<p class="told" id="looks-told" role="status"></p>
<p class="note"><span class="scale" aria-hidden="true"></span> 0 to <span id="looks-top"></span> of a head's attention,
on a scale of the square root, in {len(str(results["attention_text"]["alphabet"]))} levels up to 100 %. Arrow keys move
over a map.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Figures of these heads"><table id="looks-heads">
<thead><tr>{head}</tr></thead><tbody></tbody></table></div>
</div>
"""


_COLUMNS = (
    "query head",
    "of the parent",
    "reads KV head",
    "distance, tokens",
    "entropy, nats",
    "on the first token",
    "on the token before",
)


def figures(study: Study) -> list[Figure]:
    """How alike heads that share are, and what all heads look at, layer by layer."""
    alike = [row for row in _rows(study.record.results, "attention_alike") if row["weights"] in _MODELS]
    if not alike:
        return []
    means = {
        key: fmean(values)
        for key in {(row["weights"], row.get("grouping"), row["kv_heads"]) for row in alike}
        if (values := [v for row in alike if _key(row) == key and (v := number(row, "within_nats")) is not None])
    }
    every = [v for row in alike if row["kv_heads"] == study.full if (v := number(row, "between_nats")) is not None]
    series = [
        Series(name, color, shape, points=sorted((n, mean) for (*of, n), mean in means.items() if tuple(of) == line))
        for line, (name, color, shape) in _LINES.items()
    ]
    series = [one for one in series if one.points]
    if not series:
        return []
    rules = [Rule("any two heads", fmean(every))] if every else []
    values = [*means.values(), *(rule.y for rule in rules)]
    across = axes.head_counts("KV heads", sorted({n for *_, n in means}))
    up = axes.linear("divergence of heads that share, nats", values, forms.tick)
    columns = {
        "weights": ("weights", str),
        "kv_heads": ("KV heads", forms.whole),
        "grouping": ("who shares", str),
        "layer": ("layer", forms.whole),
        "within_nats": ("divergence within groups, nats", lambda v: f"{v:.4f}"),
        "between_nats": ("between groups, nats", lambda v: f"{v:.4f}"),
    }
    caption = (
        "Jensen-Shannon divergence between the attention of two heads, a mean over tokens and layers: 0 if they look at"
        " the same tokens, 0.69 if they share none. Of the parent's heads, those that conversion let share, and what it"
        " would be if neighbours did; then the converted model's, whose heads that share have the same keys."
    )
    tables = {"Divergence of heads": rows_table(columns, alike, gap="no such pair")}
    if looks := _mean_rows(study):
        columns = {
            "model": ("model", str),
            "layer": ("layer", forms.whole),
            "distance_tokens": (_COLUMNS[3], forms.significant),
            "entropy_nats": (_COLUMNS[4], forms.significant),
            "first_share": (_COLUMNS[5], forms.percent),
            "previous_share": (_COLUMNS[6], forms.percent),
        }
        tables["What heads look at, mean over heads"] = rows_table(columns, looks)
    return [
        Figure("alike", _title(means, study.full), caption, [("", panel(across, up, series, rules, _FRAME))], tables)
    ]


def _title(means: Mapping[tuple[Any, ...], float], full: int) -> str:
    stops = {n for *_, n in means if 1 < n < full}
    pairs = [(means.get(("parent", "as converted", n)), means.get(("parent", "neighbours", n))) for n in stops]
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
    if not ratios:
        return "How alike heads that share a KV head look"
    if max(ratios) < 1 - _TELL:
        return "Heads that came to share looked at the same tokens more than neighbours do"
    if min(ratios) > 1 + _TELL:
        return "Heads that came to share looked at the same tokens less than neighbours do"
    return "Heads that came to share looked no more alike than neighbours do"


def _mean_rows(study: Study) -> list[dict[str, Any]]:
    rows = []
    for row in _rows(study.record.results, "attention_heads"):
        means = {name: fmean(values) for name in _FIGURES if (values := _numbers(row.get(name)))}
        rows.append({"model": _model(row), "layer": row["layer"], **means})
    return rows


def _model(row: Mapping[str, Any]) -> str:
    return f"{forms.heads(row['kv_heads'])}, {_MODELS.get(row['weights'], row['weights'])}"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["weights"], row.get("grouping"), row["kv_heads"]


def _rows(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A table's rows that say of which model and layer they are."""
    table = results.get(name)
    rows = [row for row in table if isinstance(row, Mapping)] if isinstance(table, list | tuple) else []
    return [
        row
        for row in rows
        if isinstance(row.get("weights"), str) and all(isinstance(row.get(key), int) for key in ("kv_heads", "layer"))
    ]


def _tokens(results: Mapping[str, Any]) -> list[str]:
    text = results.get("attention_text")
    tokens = text.get("tokens") if isinstance(text, Mapping) and isinstance(text.get("alphabet"), str) else None
    return tokens if isinstance(tokens, list) and all(isinstance(t, str) for t in tokens) and len(tokens) > 1 else []


def _whole_maps(row: Mapping[str, Any], heads: int, tokens: int) -> bool:
    maps = row.get("maps")
    return (
        isinstance(maps, list)
        and len(maps) == heads
        and all(isinstance(one, str) and len(one) == tokens * (tokens + 1) // 2 for one in maps)
    )


def _numbers(values: Any) -> Sequence[float]:
    if not isinstance(values, list):
        return ()
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
