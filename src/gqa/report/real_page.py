"""The page of the proof on a real model, from the record of benchmarks/quality/real.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report import forms, real_figures, tables
from gqa.report.page import again, document, facts_html, figures_html, section
from gqa.report.reading import number
from gqa.units import format_bytes, format_seconds

Row = Mapping[str, Any]

COMMAND = "benchmark quality on a real model"
_TABLES = ("models", "quality", "recall", "answers", "curve", "trends", "published", "texts")
_LEDE = (
    "A published language model was converted to fewer KV heads in several ways. Loss, answers and recall of every"
    " child were measured beside its parent, on text that no conversion has read."
)


def render(record: Record) -> str:
    """The page; the same record always gives the same page. GqaError when the record is another's."""
    if record.command != COMMAND:
        raise GqaError("not a record of the proof on a real model", got=f"a record of `gqa {record.command}`")
    found: dict[str, list[Row]] = {name: list(record.results.get(name) or ()) for name in _TABLES}
    layers = list((record.results.get("diagnosis") or {}).get("rows") or ())
    if not all(isinstance(row, Mapping) for rows in (*found.values(), layers) for row in rows):
        raise GqaError("a table of the record holds something that is not a row")
    figures = real_figures
    drawn = {
        ("loss", "Loss by kind of text"): [figures.losses(found["quality"])],
        ("training", "Loss over tokens of distillation"): figures.curves(found["curve"], found["trends"]),
        ("answers", "Answers"): [figures.answers(found["answers"])],
        ("far", "Recall over the context"): [figures.recalled(found["recall"])],
        ("others", "Beside published results"): [figures.beside(found, record.inputs)],
        ("layers", "What svd loses in each layer"): [figures.layers(layers)],
    }
    sections = "".join(
        section(key, title, "", figures_html([one for one in some if one])) for (key, title), some in drawn.items()
    )
    missing = {str(number): name for number, name in enumerate(record.results.get("missing") or (), start=1)}
    texts = {row["name"]: f"{row.get('source')}; sha256 {str(row.get('sha256'))[:12]}" for row in found["texts"]}
    blocks = [
        ("What was asked", record.inputs),
        ("Texts", texts),
        ("Not measured", missing),
        ("This machine", record.machine),
        ("Versions", record.versions),
    ]
    return document(
        record,
        title="GQA: a real model",
        name=str(record.inputs.get("model") or "A real model"),
        finding=_finding(found["quality"], record.inputs),
        lede=_LEDE,
        opening=tables.html(_overview(found), "Every model"),
        figures=sections,
        how="How this was measured",
        method=facts_html(blocks, record.assumptions) + again("real.json"),
    )


def _overview(found: Mapping[str, list[Row]]) -> tables.Table:
    """A row per model: loss on every kind of text at the shortest window, answers, cost."""
    cells = real_figures.shortest(found["quality"])
    kinds = list(dict.fromkeys(row["kind"] for row in cells))
    rows = []
    for model in found["models"]:
        name = model["name"]
        row: dict[str, Any] = {"name": name}
        for kind in kinds:
            of = next((cell for cell in cells if (cell["name"], cell["kind"]) == (name, kind)), {})
            row |= {f"{kind} perplexity": number(of, "perplexity"), f"{kind} loss": _loss(of)}
            row[f"{kind} agreement"] = number(of, "top1_agreement")
        for one in found["answers"]:
            if one["name"] == name and one["prompts_from"] == "questions":
                row["kept"] = number(one, "right_answers_kept")
            elif one["name"] == name:
                row["equal"] = number(one, "answers_equal")
        for field in ("seconds", "seconds_estimate", "peak_rss_bytes", "peak_memory_bytes_estimate"):
            row[field] = number(model, field)
        rows.append(row)
    columns: dict[str, Any] = {"name": ("model", str)}
    for kind in kinds:
        columns[f"{kind} perplexity"] = (f"{kind}: perplexity", forms.significant)
        columns[f"{kind} loss"] = (f"{kind}: nats above the parent", str)
        columns[f"{kind} agreement"] = (f"{kind}: same first token", forms.percent)
    columns |= {
        "kept": ("right answers kept", forms.percent),
        "equal": ("answers equal to the parent's", forms.percent),
        "seconds": ("made in", format_seconds),
        "seconds_estimate": ("estimate", format_seconds),
        "peak_rss_bytes": ("peak memory", format_bytes),
        "peak_memory_bytes_estimate": ("estimate of it", format_bytes),
    }
    return tables.rows_table(columns, rows)


def _loss(row: Row) -> str | None:
    loss, error = (number(row, f"loss_above_parent_{name}nats") for name in ("", "standard_error_"))
    if loss is None:
        return None
    return f"{loss:.4f}" if error is None else f"{loss:.4f} ± {error:.4f}"


def _finding(quality: Sequence[Row], inputs: Mapping[str, Any]) -> str:
    rows = [row for row in real_figures.shortest(quality) if row["kind"] == "prose" and row["name"] != "parent"]
    rows = [row for row in rows if not row["name"].startswith("control") and number(row, "perplexity")]
    if not rows:
        return "The quality of the children was not measured."
    best, worst = (choose(rows, key=lambda row: row["perplexity"]) for choose in (min, max))
    heads = f"{inputs.get('kv_heads')} of {inputs.get('kv_heads_parent')} KV heads"
    return (
        f"With {heads}, perplexity on technical prose is {best['perplexity'] / best['parent_perplexity']:.2f} times the"
        f" parent's for {best['name']} and {worst['perplexity'] / worst['parent_perplexity']:.3g} times for"
        f" {worst['name']}."
    )
