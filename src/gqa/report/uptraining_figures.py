"""The figures of uptraining curves: perplexity over the share of training, ways to begin, cost of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gqa.report import axes, forms
from gqa.report.chart import Frame, Rule, Series, panel
from gqa.report.dots import Dot, dots
from gqa.report.figures import Figure
from gqa.report.reading import number, positive
from gqa.report.tables import rows_table
from gqa.units import format_seconds

Row = Mapping[str, Any]

NAMES = {"svd+refine": "refined svd", "control": "control"}
STYLES = {
    "svd+refine": ("var(--refine)", "triangle-up"),
    "svd": ("var(--svd)", "circle"),
    "procrustes": ("var(--procrustes)", "diamond"),
    "mean": ("var(--mean)", "square"),
    "first": ("var(--first)", "triangle-down"),
    "random": ("var(--random)", "cross"),
    "parent": ("var(--ink)", "circle"),
}
METHODS = tuple(STYLES)[:-1]
FITTED = METHODS[:3]
NARROW = Frame(width=430, height=230, right=136)


def alphas(rows: Sequence[Row], bounds: Sequence[Row]) -> list[Figure]:
    """Perplexity over alpha: all ways to begin, and those that are fitted against the control, close by."""
    return [figure for figure in (_curves(rows), _close(rows, bounds)) if figure]


def beginnings(rows: Sequence[Row], alpha: float) -> Figure | None:
    """The ways to begin side by side, without training and with alpha of it."""
    shares = (0.0, alpha)
    drawn = {a: matching(rows, alpha=a) for a in shares}
    values = [value for of in drawn.values() for row in of for value in _range(row, "times_control")]
    if not values:
        return None
    across = axes.rounded("perplexity, times that of the control", [*values, 1.0], lambda v: f"{v:g}×")
    panels = []
    for kv_heads in child_heads(rows):
        marks = []
        for method in METHODS:
            found = [matching(drawn[a], kv_heads=kv_heads, method=method) for a in shares]
            before, after = (_range(of[0], "times_control") if of else None for of in found)
            if before or after:
                text = " → ".join(f"{one[0]:.3f}×" for one in (before, after) if one)
                marks.append(Dot(method_name(method), before, after, text, *STYLES[method]))
        if marks:
            panels.append((forms.heads(kv_heads), dots(across, marks, [1.0])))
    caption = (
        f"Hollow: right after conversion, against the parent. Filled: after {forms.percent(alpha)} of the parent's"
        " tokens, against the control, the parent trained on the same. Means over seeds; bars reach from the lowest to"
        " the highest."
    )
    table = _table([row for a in shares for row in drawn[a]])
    return Figure("beginnings", _beginnings_title(rows, alpha), caption, panels, {"Ways to begin": table})


def cost(rows: Sequence[Row]) -> Figure | None:
    """Seconds of a training step over the dial, beside what the planner's FLOPs would take at the first stop's rate."""
    heads = sorted({row["kv_heads"] for row in rows}, reverse=True)
    series = []
    for teacher, name, color, shape in (
        (True, "taught", "var(--mean)", "square"),
        (False, "alone", "var(--svd)", "circle"),
    ):
        of = [row for row in rows if row["teacher"] == teacher and positive(row, "core_seconds_per_step_p50")]
        marks = [(row["kv_heads"], row["core_seconds_per_step_p50"]) for row in of]
        hollow = [(row["kv_heads"], row["core_seconds_per_step_predicted"]) for row in of]
        if marks:
            text = f"{name} {format_seconds(marks[-1][1])}"
            series.append(Series(text, color, shape, points=marks, hollow=hollow, path=marks))
    if len(heads) < 2 or not series:
        return None
    seconds = [b for one in series for _, b in (*one.points, *one.hollow)]
    across = axes.head_counts("KV heads", heads)
    up = axes.rounded("time of all cores, a step", seconds, format_seconds)
    alone = {row["kv_heads"]: row for row in rows if not row["teacher"]}
    first, last = alone.get(heads[0]), alone.get(heads[-1])
    title = "What a training step takes over the dial"
    if first and last:
        saved = 1 - last["core_seconds_per_step_p50"] / first["core_seconds_per_step_p50"]
        predicted = 1 - last["flops_per_step"] / first["flops_per_step"]
        title = (
            f"A step with {forms.heads(heads[-1])} takes {_less(saved)} work than with {heads[0]}; the planner's FLOPs"
            f" are {_less(predicted)}"
        )
    caption = (
        "Forward, backward and optimizer on one batch, alone or with the parent as teacher; the stops take turns."
        " Filled marks are medians of the time that all cores spend, hollow ones are predicted: FLOPs at the rate that"
        " the most KV heads reach alone. Training reads no cache, so it gains only what the smaller projections save."
    )
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "with": ("trained", str),
        "core_seconds_per_step_p50": ("time of all cores, median", format_seconds),
        "core_seconds_per_step_predicted": ("predicted", format_seconds),
        "seconds_per_step_p20": ("by the clock, p20", format_seconds),
        "seconds_per_step_p50": ("median", format_seconds),
        "seconds_per_step_p80": ("p80", format_seconds),
        "flops_per_step": ("GFLOPs predicted", lambda n: f"{n / 1e9:.1f}"),
    }
    told = [{**row, "with": "taught by the parent" if row["teacher"] else "alone"} for row in rows]
    table = rows_table(columns, told)
    return Figure("cost", title, caption, [("", panel(across, up, series, frame=NARROW))], {"Cost of a step": table})


def _curves(rows: Sequence[Row]) -> Figure | None:
    shares = sorted({row["alpha"] for row in rows})
    if len(shares) < 2:
        return None
    across = axes.linear("share of the parent's training tokens", shares, forms.percent_tick)
    values = [value for row in rows for value in _range(row, "perplexity")]
    up = axes.rounded("perplexity", values, forms.significant)
    panels = []
    for kv_heads in child_heads(rows):
        series = [_line(rows, kv_heads, method, "perplexity", forms.significant) for method in METHODS]
        control = Series(
            "control", "var(--ink)", "circle", path=[(r["alpha"], r["perplexity_mean"]) for r in _controls(rows)]
        )
        drawn = [one for one in (*series, control) if one.line]
        panels.append((forms.heads(kv_heads), panel(across, up, drawn, frame=NARROW)))
    caption = (
        "Each mark is a training of its own, whose learning rate falls to zero at its end, with the parent as teacher."
        " Marks are means over seeds, bands reach from the lowest to the highest seed. The control is the parent"
        " itself, trained on the same tokens."
    )
    return Figure("curves", _curves_title(rows), caption, panels, {"Perplexity over alpha": _table(rows)})


def _close(rows: Sequence[Row], bounds: Sequence[Row]) -> Figure | None:
    """The fitted ways alone, as multiples of the control's perplexity, where the others would be off the panel."""
    fitted = [row for row in rows if row["method"] in FITTED]
    shares = sorted({row["alpha"] for row in fitted})
    if len(shares) < 2:
        return None
    values = [value for row in fitted for value in _range(row, "times_control")]
    values += [1.0, *(row["bound"] for row in bounds)]
    across = axes.linear("share of the parent's training tokens", shares, forms.percent_tick)
    up = axes.rounded("perplexity, times the control's", values, lambda v: f"{v:g}×")
    panels = []
    for kv_heads in child_heads(fitted):
        series = [_line(fitted, kv_heads, m, "times_control", lambda v: f"{v:.3f}×") for m in FITTED]
        rules = [Rule("control", 1.0, "var(--ink)")]
        rules += [Rule(f"bound {r['bound']:g}×", r["bound"]) for r in bounds if r["kv_heads"] == kv_heads]
        panels.append((forms.heads(kv_heads), panel(across, up, [s for s in series if s.line], rules, NARROW)))
    told = [
        f"{forms.heads(row['kv_heads'])} {row['times_control_mean']:.4f}× (bound {row['bound']:g}×)" for row in bounds
    ]
    caption = "The fitted ways to begin, against the control of the same seed and share."
    if told:
        caption += f" Refined first, at {forms.percent(bounds[0]['alpha'])}: {', '.join(told)}."
    taught = [f"{row['times_taught_control_mean']:.4f}×" for row in bounds if number(row, "times_taught_control_mean")]
    if taught:
        caption += f" The parent gains from itself as teacher, too: against that control, {' and '.join(taught)}."
    return Figure("close", _close_title(bounds), caption, panels, {"Against the control": _table(fitted)})


def _line(rows: Sequence[Row], kv_heads: int, method: str, figure: str, form: Any) -> Series:
    of = sorted(matching(rows, kv_heads=kv_heads, method=method), key=lambda row: row["alpha"])
    marks = [(row["alpha"], row[f"{figure}_mean"]) for row in of]
    spans = [(row["alpha"], row[f"{figure}_low"], row[f"{figure}_high"]) for row in of]
    name = f"{method_name(method)} {form(marks[-1][1])}" if marks else method
    return Series(name, *STYLES[method], points=marks, spreads=spans if len(spans) > 1 else (), band=True)


def _table(rows: Sequence[Row]) -> Any:
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "method": ("method", str),
        "alpha": ("share of the tokens", lambda share: f"{share:.0%}"),
        "seeds": ("seeds", forms.whole),
        "perplexity_mean": ("perplexity", lambda v: f"{v:.2f}"),
        "perplexity_low": ("lowest", lambda v: f"{v:.2f}"),
        "perplexity_high": ("highest", lambda v: f"{v:.2f}"),
        "perplexity_deviation": ("standard deviation", lambda v: f"{v:.3f}"),
        "times_control_mean": ("times the control's", lambda v: f"{v:.4f}"),
        "times_control_low": ("lowest ratio", lambda v: f"{v:.4f}"),
        "times_control_high": ("highest ratio", lambda v: f"{v:.4f}"),
    }
    return rows_table(columns, rows)


def matching(rows: Sequence[Row], **key: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in key.items())]


def _controls(rows: Sequence[Row]) -> list[Row]:
    return sorted(matching(rows, method="control"), key=lambda row: row["alpha"])


def child_heads(rows: Sequence[Row]) -> list[int]:
    """The numbers of KV heads of the children, most first."""
    return sorted({row["kv_heads"] for row in rows if row["method"] in METHODS}, reverse=True)


def _range(row: Row, figure: str) -> tuple[float, float, float]:
    return row[f"{figure}_mean"], row[f"{figure}_low"], row[f"{figure}_high"]


def method_name(method: str) -> str:
    return NAMES.get(method, method)


def _less(share: float) -> str:
    return f"{forms.percent(share)} less" if share > 0 else f"{forms.percent(-share)} more"


def _curves_title(rows: Sequence[Row]) -> str:
    fewest, last = min(child_heads(rows)), max(row["alpha"] for row in rows)
    ends = {
        method: [
            row["perplexity_mean"]
            for a in (0.0, last)
            for row in matching(rows, kv_heads=fewest, method=method, alpha=a)
        ]
        for method in ("mean", "svd+refine")
    }
    if any(len(values) != 2 for values in ends.values()):
        return "Perplexity over the share of training"
    (mean_start, mean_end), (start, _) = ends["mean"], ends["svd+refine"]
    reached = "still behind" if mean_end > start else "level with"
    return (
        f"At {forms.heads(fewest)} training takes mean pooling from {forms.significant(mean_start)} to"
        f" {forms.significant(mean_end)}, {reached} refined svd before any training, {forms.significant(start)}"
    )


def _close_title(bounds: Sequence[Row]) -> str:
    if not bounds:
        return "The fitted ways against the control"
    met = [row for row in bounds if row["within"]]
    told = " and ".join(f"{forms.heads(row['kv_heads'])} {row['times_control_mean']:.3f}×" for row in bounds)
    verdict = "within both bounds" if len(met) == len(bounds) > 1 else f"{len(met)} of {len(bounds)} within its bound"
    return f"Refined and uptrained, {told} the control's perplexity: {verdict}"


def _beginnings_title(rows: Sequence[Row], alpha: float) -> str:
    best = {}
    for a in (0.0, alpha):
        of = [row for row in rows if row["alpha"] == a and row["method"] in METHODS]
        if not of:
            return "Ways to begin"
        fewest = min(row["kv_heads"] for row in of)
        best[a] = min((row for row in of if row["kv_heads"] == fewest), key=lambda row: row["times_control_mean"])
    before, after = (method_name(best[a]["method"]) for a in (0.0, alpha))
    if before == after:
        return f"{before[:1].upper()}{before[1:]} is the best beginning, trained or not"
    return f"The best beginning is {before} without training, {after} after {forms.percent(alpha)} of it"
