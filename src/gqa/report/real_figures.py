"""Figures of the proof on a real model: which rows of its record each draws, and the table below it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gqa.report import axes, forms
from gqa.report.bars import Bar, bars
from gqa.report.chart import Frame, Series, panel
from gqa.report.figures import Figure
from gqa.report.reading import number, points, positive
from gqa.report.tables import rows_table

Row = Mapping[str, Any]

_COLORS = ("var(--mean)", "var(--procrustes)", "var(--svd)", "var(--refine)", "var(--random)", "var(--first)")
_SHAPES = ("square", "diamond", "circle", "triangle-up", "cross", "triangle-down")
_SMALL = Frame(width=330, height=200, left=58, right=96)
_NAMED = Frame(width=430, height=250, right=170)
_WIDE = 1.96  # standard errors for 95 %
_SERIES = {"prose": "prose", "half prose, half the parent's own text": "half own text", "control": "control"}


def shortest(quality: Sequence[Row]) -> list[Row]:
    """The rows of the shortest window, which every kind of text has."""
    least = min((row["window"] for row in quality), default=0)
    return [row for row in quality if row["window"] == least]


def losses(quality: Sequence[Row]) -> Figure | None:
    """Nats above the parent by kind of text; of the distillations the longest, of the controls none."""
    rows = [row for row in shortest(quality) if number(row, "loss_above_parent_nats") is not None]
    names = _drawn_models(rows)
    groups: dict[str, list[Bar]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = {row["name"]: row["loss_above_parent_nats"] for row in rows if row["kind"] == kind}
        some = [Bar(n, of[n], f"{of[n]:.3f}", _color(names, n)) for n in names if n in of]
        groups |= {kind: some} if some else {}
    if not groups:
        return None
    values = [bar.value for some in groups.values() for bar in some]
    across = axes.linear("nats per token above the parent", values, forms.tick)
    columns = {
        "name": ("model", str),
        "kind": ("text", str),
        "window": ("window", forms.tokens),
        "perplexity": ("perplexity", forms.significant),
        "parent_perplexity": ("parent's", forms.significant),
        "loss_above_parent_nats": ("nats above", lambda v: f"{v:.4f}"),
        "loss_above_parent_standard_error_nats": ("standard error", lambda v: f"{v:.4f}"),
        "kl_to_parent_nats": ("KL, nats", lambda v: f"{v:.4f}"),
        "top1_agreement": ("same first token", forms.percent),
        "windows": ("windows", forms.whole),
    }
    caption = (
        f"Cross-entropy above the parent's on windows of {forms.tokens(rows[0]['window'])} tokens, paired window by"
        " window. The table has all models, windows and standard errors."
    )
    title = "What each way to convert loses, by kind of text"
    return Figure("losses", title, caption, [("", bars(across, groups))], {"Loss": rows_table(columns, quality)})


def curves(curve: Sequence[Row], trends: Sequence[Row]) -> list[Figure]:
    """A panel per kind of text: loss over tokens of distillation, and the fitted power law as the line."""
    rows = [row for row in shortest(curve) if positive(row, "loss_above_parent_nats")]
    if not rows:
        return []
    across = axes.contexts("tokens of distillation", [row["tokens"] for row in rows])
    up = axes.rounded("nats above the parent", [row["loss_above_parent_nats"] for row in rows], forms.tick)
    panels = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        series = []
        for place, (key, name) in enumerate(_SERIES.items(), start=2):
            of = [row for row in rows if (row["kind"], row["series"]) == (kind, key)]
            drawn = list(points(of, "tokens", "loss_above_parent_nats"))
            if drawn:
                spans = [_span(row, up) for row in of]
                line = _trend_line(trends, rows[0]["window"], kind, key, drawn, up)
                series.append(Series(name, _COLORS[place], _SHAPES[place], points=drawn, spreads=spans, path=line))
        if series:
            panels.append((kind, panel(across, up, series, frame=_SMALL)))
    columns = {
        "series": ("trained on", str),
        "tokens": ("tokens", forms.tokens),
        "kind": ("text", str),
        "window": ("window", forms.tokens),
        "loss_above_parent_nats": ("nats above", lambda v: f"{v:.4f}"),
        "loss_above_parent_standard_error_nats": ("standard error", lambda v: f"{v:.4f}"),
        "kl_to_parent_nats": ("KL, nats", lambda v: f"{v:.4f}"),
    }
    fitted = {
        "series": ("trained on", str),
        "kind": ("text", str),
        "window": ("window", forms.tokens),
        "figure": ("figure", str),
        "rows": ("points", forms.whole),
        "a": ("a", forms.significant),
        "b": ("b", lambda v: f"{v:.3f}"),
        "b_low": ("from", lambda v: f"{v:.3f}"),
        "b_high": ("to", lambda v: f"{v:.3f}"),
    }
    caption = (
        "Bars are 95 % intervals over windows. Where three distillations or more are finished, the line is the fitted"
        " loss = a * tokens^-b; the table has the 95 % interval of b. The control is the parent trained on the same"
        " windows; it is drawn only where it loses."
    )
    named = {"Loss over tokens": rows_table(columns, curve), "Fitted power laws": rows_table(fitted, trends)}
    return [Figure("curves", "Loss falls with the tokens of distillation", caption, panels, named)]


def answers(rows: Sequence[Row]) -> Figure | None:
    """Right answers kept, and answers equal to the parent's, by model."""
    names = _drawn_models(rows)
    fields = (
        ("right answers kept", "questions", "right_answers_kept"),
        ("equal answers", "own", "answers_equal"),
        ("degenerate", "own", "degenerate_answers"),
    )
    panels = []
    for heading, source, field in fields:
        of = {
            row["name"]: row[field] for row in rows if row["prompts_from"] == source and number(row, field) is not None
        }
        some = {_label(n): [Bar("", of[n], forms.percent(of[n]), _color(names, n))] for n in names if n in of}
        if some:
            across = axes.linear("share", [*of.values(), 1.0], forms.percent_tick)
            panels.append((heading, bars(across, some)))
    if not panels:
        return None
    columns = {
        "name": ("model", str),
        "prompts_from": ("prompts", str),
        "prompts": ("how many", forms.whole),
        "answers_equal": ("equal", forms.percent),
        "common_prefix_share": ("equal up to", forms.percent),
        "answers_kl_nats": ("KL on the parent's answers, nats", lambda v: f"{v:.4f}"),
        "right_answers": ("right", forms.percent),
        "parent_right_answers": ("right, parent", forms.percent),
        "right_answers_kept": ("right answers kept", forms.percent),
        "right_answers_kept_standard_error": ("standard error", forms.percent),
        "degenerate_answers": ("degenerate", forms.percent),
        "parent_degenerate_answers": ("degenerate, parent", forms.percent),
    }
    caption = (
        "Greedy answers of parent and child to the same prompts. Kept: of the questions that the parent answers right,"
        " those that the child answers right. Degenerate: an answer that repeats itself."
    )
    return Figure(
        "kept", "Does the child still answer like its parent?", caption, panels, {"Answers": rows_table(columns, rows)}
    )


def recalled(rows: Sequence[Row]) -> Figure | None:
    """Accuracy over the context, the mean over depths, by task."""
    panels, names = [], list(dict.fromkeys(row["name"] for row in rows))
    drawn = [name for name in names if name == "parent" or name in _drawn_models(rows)]
    for task in dict.fromkeys(row["task"] for row in rows):
        series = []
        for name in drawn:
            of = [row for row in rows if (row["name"], row["task"]) == (name, task)]
            lengths = sorted({row["context_tokens"] for row in of})
            line = [(n, statistics.fmean(row["accuracy"] for row in of if row["context_tokens"] == n)) for n in lengths]
            if line:
                color = "var(--ink)" if name == "parent" else _color(_drawn_models(rows), name)
                series.append(Series(name, color, _SHAPES[drawn.index(name) % len(_SHAPES)], points=line))
        across = axes.contexts("tokens of context", [x for one in series for x, _ in one.points])
        panels.append((task, panel(across, axes.linear("accuracy", [0, 1], forms.percent_tick), series, frame=_NAMED)))
    if not panels:
        return None
    columns = {
        "name": ("model", str),
        "task": ("task", str),
        "context_tokens": ("context", forms.tokens),
        "depth": ("depth", forms.percent_tick),
        "samples": ("items", forms.whole),
        "accuracy": ("accuracy", forms.percent),
        "nats_per_answer_token": ("nats per token", lambda v: f"{v:.3f}"),
        "nats_without": ("without the number", lambda v: f"{v:.3f}"),
    }
    caption = "Items whose whole answer the model would write. Children do the tasks that the parent does there."
    return Figure("recall", "What is found again far back", caption, panels, {"Recall": rows_table(columns, rows)})


def beside(found: Mapping[str, Sequence[Row]], inputs: Mapping[str, Any]) -> Figure | None:
    """Perplexity as a multiple of the parent's over the share of the cache saved: ours filled, others hollow."""
    others = [
        row for row in found["published"] if number(row, "cache_saved") and positive(row, "times_parent_perplexity")
    ]
    heads, full = inputs.get("kv_heads"), inputs.get("kv_heads_parent")
    own = [row for row in shortest(found["quality"]) if row["kind"] == "prose" and positive(row, "perplexity")]
    names = _drawn_models(own)
    ours = [(row["name"], row["perplexity"] / row["parent_perplexity"]) for row in own if row["name"] in names]
    series = []
    for place, work in enumerate(dict.fromkeys((row["work"], row["stage"]) for row in others)):
        of = [(r["cache_saved"], r["times_parent_perplexity"]) for r in others if (r["work"], r["stage"]) == work]
        color = "var(--ink-soft)"
        series.append(Series(_short(*work), color, _SHAPES[place % len(_SHAPES)], hollow=of, path=of))
    if ours and heads and full:
        saved = 1 - heads / full
        series += [Series(name, _color(names, name), "circle", points=[(saved, ratio)]) for name, ratio in ours]
    drawn = [point for one in series for point in (*one.points, *one.hollow)]
    if not drawn:
        return None
    across = axes.linear("share of the KV cache that is saved", [x for x, _ in drawn] + [1.0], forms.percent_tick)
    up = axes.rounded("perplexity, times the parent's", [y for _, y in drawn] + [1.0], forms.tick)
    columns = {
        "work": ("work", str),
        "source": ("source", str),
        "model": ("model", str),
        "plain_gqa": ("plain GQA", str),
        "cache_saved": ("cache saved", forms.percent),
        "stage": ("stage", str),
        "training_tokens": ("training tokens", forms.about),
        "metric": ("metric", str),
        "parent": ("parent", forms.significant),
        "child": ("child", forms.significant),
        "times_parent_perplexity": ("times the parent's perplexity", forms.significant),
        "differs": ("what differs", str),
    }
    rows = [{**row, "plain_gqa": "yes" if row.get("plain_gqa") else "no"} for row in found["published"]]
    caption = (
        "Filled: measured here on technical prose. Hollow: published, of other models and texts, so only the order of"
        " size can be compared. Rows without a perplexity or a saved share are in the table alone."
    )
    title = "Others' conversions, as they published them"
    frame = Frame(width=640, height=330, right=250)
    return Figure(
        "published",
        title,
        caption,
        [("", panel(across, up, series, frame=frame))],
        {"Published": rows_table(columns, rows)},
    )


def layers(rows: Sequence[Row]) -> Figure | None:
    """The closed form's share of lost output by layer, and how large hidden states are."""
    if not rows:
        return None
    across = axes.whole_numbers("layer", [row["layer"] for row in rows])
    panels = []
    for quantile, heading in (
        ("p50", "median over tokens"),
        ("p90", "90th percentile"),
        ("of_squares", "sum of squares"),
    ):
        parts = (("keys", 0), ("values", 2), ("both", 3))
        values = [v for row in rows for name, _ in parts if (v := positive(row, f"{name}_error_{quantile}"))]
        if values:
            up = axes.rounded("share of the output that is lost", values, forms.percent_tick)
            series = [
                Series(name, _COLORS[n], _SHAPES[n], path=list(points(rows, "layer", f"{name}_error_{quantile}")))
                for name, n in parts
            ]
            panels.append((heading, panel(across, up, series, frame=_SMALL)))
    sizes = [v for row in rows for name in ("p50", "max") if (v := positive(row, f"hidden_rms_{name}"))]
    if sizes:
        up = axes.rounded("rms of hidden states", sizes, forms.tick)
        series = [
            Series(name, color, "circle", path=list(points(rows, "layer", f"hidden_rms_{field}")))
            for name, field, color in (("largest", "max", "var(--mean)"), ("median", "p50", "var(--svd)"))
        ]
        panels.append(("hidden states before the layer", panel(across, up, series, frame=_SMALL)))
    errors = {
        f"{name}_error_{q}": (f"{name}, {q.replace('_', ' ')}", forms.percent)
        for name in ("keys", "values", "both")
        for q in ("p50", "p90", "of_squares")
    }
    columns = {
        "layer": ("layer", str),
        **errors,
        "hidden_rms_p50": ("hidden rms, median", forms.significant),
        "hidden_rms_max": ("largest", forms.significant),
        "largest_token_place": ("at token", str),
    }
    caption = (
        "Every layer reads its parent's inputs; keys, values or both are shared by svd in closed form, nothing is"
        " refitted. Where a few tokens have hidden states far above the median (massive activations), the sum of"
        " squares is theirs alone."
    )
    return Figure("diagnosis", "Which layer loses what", caption, panels, {"By layer": rows_table(columns, rows)})


def _drawn_models(rows: Sequence[Row]) -> list[str]:
    """Children in the order of the record; of distillations of one text only the longest, and no control."""
    last: dict[str, str] = {}
    for name in dict.fromkeys(str(row["name"]) for row in rows):
        if name != "parent" and not name.startswith("control"):
            last[name.rpartition("-")[0] if name.startswith("distilled") else name] = name
    return list(last.values())


def _label(name: str) -> str:
    """A model's name, short enough to stand left of bars."""
    return name.removeprefix("svd-").replace("distilled-half-own", "half-own")


def _color(names: Sequence[str], name: str) -> str:
    return _COLORS[names.index(name) % len(_COLORS)]


def _span(row: Row, up: axes.Axis) -> tuple[float, float, float]:
    """(tokens, low, high): the 95 % interval inside the axis."""
    loss, error = row["loss_above_parent_nats"], number(row, "loss_above_parent_standard_error_nats") or 0.0
    return row["tokens"], max(loss - _WIDE * error, up.low), min(loss + _WIDE * error, up.high)


def _trend_line(
    trends: Sequence[Row], window: int, kind: str, series: str, drawn: Sequence[tuple[float, float]], up: axes.Axis
) -> list[tuple[float, float]]:
    """The fitted power law from the first to the last point; the points themselves where nothing was fitted."""
    wanted = {"series": series, "kind": kind, "window": window, "figure": "loss_above_parent_nats"}
    fit = next((row for row in trends if wanted.items() <= row.items()), None)
    if fit is None:
        return list(drawn)
    ends = [min(x for x, _ in drawn), max(x for x, _ in drawn)]
    return [(x, min(max(fit["a"] * x ** -fit["b"], up.low), up.high)) for x in ends]


def _short(work: str, stage: str) -> str:
    return f"{work}, {'trained' if stage == 'after training' else 'converted'}"
