"""The figures of what is found again far back in a context: recall over its length, loss over position."""

from __future__ import annotations

from collections.abc import Sequence

from gqa.report import axes, forms
from gqa.report.chart import Series, panel
from gqa.report.figures import Figure
from gqa.report.reading import number
from gqa.report.tables import rows_table
from gqa.report.uptraining_figures import METHODS, NARROW, STYLES, Row, child_heads, matching, method_name


def recalled(rows: Sequence[Row]) -> list[Figure]:
    """How many hidden numbers are found again over the length of the context, for the parent and its children."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of = [row for row in rows if row["task"] == task]
        lengths = sorted({row["context_tokens"] for row in of})
        across = axes.contexts("context, tokens", lengths if len(lengths) > 1 else [lengths[0], 2 * lengths[0]])
        up = axes.linear("found again", [0.0, 1.0], forms.percent_tick)
        panels = []
        for kv_heads in child_heads(of):
            series = []
            for method in ("parent", *METHODS):
                marks = [(n, share) for n in lengths if (share := _accuracy(of, kv_heads, method, n)) is not None]
                if marks:
                    name = f"{method_name(method)} {forms.percent_tick(round(marks[-1][1], 2))}"
                    series.append(Series(name, *STYLES[method], points=marks))
            panels.append((forms.heads(kv_heads), panel(across, up, series, frame=NARROW)))
        columns = {
            "kv_heads": ("KV heads", forms.whole),
            "method": ("method", str),
            "context_tokens": ("context, tokens", forms.whole),
            "depth": ("hidden at", lambda share: f"{share:.0%}"),
            "accuracy": ("found", lambda share: f"{share:.0%}"),
            "nats_per_answer_token": ("nats of the answer", forms.significant),
            "nats_without": ("if it is not there", forms.significant),
        }
        found.append(
            Figure(
                f"recall-{task}",
                _recall_title(of, task),
                "A parent of its own, trained from scratch to look things up; its children are converted, not trained."
                f" A number is hidden in other text and asked for at the end ({task}); it counts as found when every"
                " token of it is the model's first choice. Marks are means over depths, which the table tells apart.",
                panels,
                {"Recall": rows_table(columns, of)},
            )
        )
    return found


def positions(rows: Sequence[Row]) -> Figure | None:
    """Loss above the parent's over how many tokens a token has before it."""
    children = [row for row in rows if row["method"] != "parent" and number(row, "loss_above_parent_nats") is not None]
    if not children:
        return None
    across = axes.contexts("tokens before", [row["context_from"] for row in children])
    ends = [(row["loss_above_parent_nats"], row["loss_above_parent_standard_error_nats"] or 0.0) for row in children]
    up = axes.linear("nats above the parent", [v + s * e for v, e in ends for s in (-1, 1)], forms.tick)
    panels = []
    for kv_heads in child_heads(children):
        series = []
        for method in METHODS:
            of = [row for row in children if (row["kv_heads"], row["method"]) == (kv_heads, method)]
            marks = [(row["context_from"], row["loss_above_parent_nats"]) for row in of]
            errors = [row["loss_above_parent_standard_error_nats"] or 0.0 for row in of]
            spans = [(a, b - e, b + e) for (a, b), e in zip(marks, errors, strict=True)]
            if marks:
                series.append(Series(method_name(method), *STYLES[method], points=marks, spreads=spans))
        panels.append((forms.heads(kv_heads), panel(across, up, series, frame=NARROW)))
    columns = {
        "kv_heads": ("KV heads", forms.whole),
        "method": ("method", str),
        "context_from": ("tokens before, from", forms.whole),
        "context_to": ("to", forms.whole),
        "perplexity": ("perplexity", forms.significant),
        "loss_above_parent_nats": ("above the parent, nats", lambda v: f"{v:+.4f}"),
        "loss_above_parent_standard_error_nats": ("standard error", lambda v: f"{v:.4f}"),
    }
    caption = (
        "Cross-entropy of a token above the parent's, by the number of tokens before it, in ranges that double; bars"
        " are standard errors over windows. A child that read far back worse than near by would rise to the right."
    )
    longest = max(row["context_to"] for row in children)
    title = f"Loss over the context, up to {forms.whole(longest + 1)} tokens"
    return Figure("positions", title, caption, panels, {"Loss by position": rows_table(columns, rows)})


def _accuracy(rows: Sequence[Row], kv_heads: int, method: str, length: int) -> float | None:
    of = matching(rows, method=method, context_tokens=length)
    of = [row for row in of if method == "parent" or row["kv_heads"] == kv_heads]
    return sum(row["accuracy"] for row in of) / len(of) if of else None


def _recall_title(rows: Sequence[Row], task: str) -> str:
    lengths = {row["context_tokens"] for row in rows}
    longest, fewest = max(lengths), min(child_heads(rows), default=0)
    parent, child = (_accuracy(rows, fewest, method, longest) for method in ("parent", "svd+refine"))
    if parent is None or child is None:
        return f"Recall of a {task} over the context"
    return (
        f"At {longest} tokens {forms.heads(fewest)}, refined, {'finds' if fewest == 1 else 'find'} {child:.0%} of the"
        f" hidden numbers, the parent {parent:.0%}"
    )
