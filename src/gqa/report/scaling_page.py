"""The page of what a conversion loses against the parent's size, from the record of benchmarks/scaling.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report import axes, forms
from gqa.report.chart import Frame, Series, panel
from gqa.report.figures import Figure
from gqa.report.page import again, document, facts_html, figures_html, section
from gqa.report.reading import positive
from gqa.report.tables import Table, rows_table

Row = Mapping[str, Any]

COMMAND = "benchmark scaling"
_STYLES = {
    "mean": ("var(--mean)", "square"),
    "svd": ("var(--svd)", "circle"),
    "svd, refined": ("var(--refine)", "triangle-up"),
}
_FRAME = Frame(width=430, height=230, right=128)
_WIDE = 1.96  # standard errors for 95 %
_LEDE = (
    "Does what holds for a small model hold for a larger one? Parents of several sizes were trained on the same text,"
    " then given fewer KV heads. What that loses right after the conversion, before any training, was measured here."
)
_AXES = {"parameters": "parameters", "train_tokens": "tokens seen", "calibration_tokens": "calibration tokens"}


def render(record: Record) -> str:
    """The page; the same record always gives the same page. GqaError when the record is another's."""
    if record.command != COMMAND:
        raise GqaError("not a record of scaling with size", got=f"a record of `gqa {record.command}`")
    rows, trends = ([*(record.results.get(name) or ())] for name in ("scaling", "trends"))
    if not all(isinstance(row, Mapping) for row in (*rows, *trends)):
        raise GqaError("a record of scaling with a table that is none")
    rows = [row for row in rows if positive(row, "parameters") and positive(row, "loss_above_parent_nats")]
    drawn = [figure for figure in (_losses(rows), _trends(trends)) if figure]
    blocks = [("What was asked", record.inputs), ("This machine", record.machine), ("Versions", record.versions)]
    return document(
        record,
        title="GQA: scaling with size",
        name="Scaling with size",
        finding=_finding(rows),
        lede=_LEDE,
        figures=section("size", "What a conversion loses, by size", "", figures_html(drawn)),
        how="How this was measured",
        method=facts_html(blocks, record.assumptions) + again("scaling.json"),
    )


def _losses(rows: Sequence[Row]) -> Figure | None:
    """A panel per number of KV heads: loss over parameters, a line per method and length of training."""
    if not rows:
        return None
    least = min((row["calibration_tokens"] for row in rows if row["method"] != "mean"), default=0)
    some = [row for row in rows if row["calibration_tokens"] in (0, least)]
    longest = max(row["train_tokens"] for row in some)
    values = [row["loss_above_parent_nats"] for row in some]
    up = axes.rounded("nats per token above the parent", values, lambda v: f"{v:g}")
    across = axes.rounded("parameters of the parent", [row["parameters"] for row in some], _count)
    panels = []
    for kv_heads in sorted({row["kv_heads"] for row in some}, reverse=True):
        series = []
        for method, (color, shape) in _STYLES.items():
            of = [row for row in some if (row["kv_heads"], row["method"]) == (kv_heads, method)]
            full = sorted(
                (row["parameters"], row["loss_above_parent_nats"], _error(row)) for row in of if _is(row, longest)
            )
            short = [(row["parameters"], row["loss_above_parent_nats"]) for row in of if not _is(row, longest)]
            if full:
                spans = [(x, max(y - e, up.low), min(y + e, up.high)) for x, y, e in full]
                points = [(x, y) for x, y, _ in full]
                series.append(Series(method, color, shape, points=points, spreads=spans, hollow=short, path=points))
        if series:
            panels.append((forms.heads(kv_heads), panel(across, up, series, frame=_FRAME)))
    columns = {
        "size": ("parent", str),
        "parameters": ("parameters", lambda n: f"{n:,}"),
        "train_tokens": ("tokens seen", _count),
        "kv_heads": ("KV heads", forms.whole),
        "method": ("method", str),
        "calibration_tokens": ("calibration tokens", lambda n: forms.tokens(n) if n else "none"),
        "parent_perplexity": ("perplexity of the parent", lambda v: f"{v:.2f}"),
        "perplexity": ("after", lambda v: f"{v:.2f}"),
        "loss_above_parent_nats": ("nats above", lambda v: f"{v:.4f}"),
        "loss_above_parent_standard_error_nats": ("standard error", lambda v: f"{v:.4f}"),
        "share_of_mean_loss": ("of mean's loss", lambda v: f"1/{1 / v:.0f}" if v < 1 else "1"),
    }
    fitted = f"; fitted on {forms.tokens(least)} tokens" if least else ""
    caption = (
        f"Right after the conversion, on test text{fitted}. Filled:"
        f" parents that saw {_count(longest)} tokens; bars are 95 % intervals over windows."
    )
    if any(not _is(row, longest) for row in some):
        caption += " Hollow: parents that saw fewer."
    return Figure(
        "losses",
        _title([row for row in some if _is(row, longest)]),
        caption,
        panels,
        {"Loss by size": rows_table(columns, rows)},
    )


def _trends(trends: Sequence[Row]) -> Figure | None:
    """The fitted exponents, as a table under the words."""
    if not trends:
        return None
    lines = []
    for row in trends:
        cells = [str(row["kv_heads"]), row["method"], str(row["rows"])]
        for name in _AXES:
            of = row["exponents"].get(name)
            cells.append(f"{of['exponent']:+.2f} ({of['low']:+.2f} to {of['high']:+.2f})" if of else "-")
        lines.append(cells)
    table = Table(["KV heads", "method", "rows", *_AXES.values()], lines, frozenset({"method", *_AXES.values()}))
    caption = (
        "The loss as a product of powers, fitted to the rows of one method and number of KV heads: -0.3 means that"
        " ten times as much halves it. 95 % intervals; with few rows they are wide, and they say nothing of models"
        " beyond the sizes shown."
    )
    return Figure("trends", "Powers that the loss follows", caption, [], {"Fitted exponents": table})


def _finding(rows: Sequence[Row]) -> str:
    best = [row for row in rows if row["method"] == "svd, refined" and row.get("share_of_mean_loss")]
    if not best:
        return "What a conversion loses was not measured at several sizes."
    shares = [1 / row["share_of_mean_loss"] for row in best]
    sizes = [row["parameters"] for row in rows]
    return (
        f"From {_count(min(sizes))} to {_count(max(sizes))} parameters, refined svd loses"
        f" 1/{min(shares):.0f} to 1/{max(shares):.0f} of what mean pooling loses."
    )


def _title(rows: Sequence[Row]) -> str:
    """What becomes of the loss from the smallest to the largest parent, at the KV heads with most rows."""
    of = [row for row in rows if row["method"] == "svd, refined"]
    heads = {row["kv_heads"] for row in of}
    if not heads:
        return "What a conversion loses, by size"
    counts = {n: len({row["size"] for row in of if row["kv_heads"] == n}) for n in heads}
    kv_heads = max(heads, key=lambda n: (counts[n], n))
    line = sorted((row["parameters"], row["loss_above_parent_nats"]) for row in of if row["kv_heads"] == kv_heads)
    (small, first), (large, last) = line[0], line[-1]
    if small == large:
        return "What a conversion loses, by size"
    word = "less" if last < first else "more"
    ratio = max(first / last, last / first)
    return (
        f"Refined to {forms.heads(kv_heads)}, a parent of {_count(large)} parameters loses {ratio:.1f} times {word}"
        f" than one of {_count(small)}"
    )


def _is(row: Row, longest: int) -> bool:
    return row["train_tokens"] == longest


def _error(row: Row) -> float:
    error = positive(row, "loss_above_parent_standard_error_nats")
    return _WIDE * error if error and math.isfinite(error) else 0.0


def _count(number: float) -> str:
    return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number / 1e3:.3g}k"
