"""The page of uptraining curves, from the record of benchmarks/uptraining.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report import forms, recall_figures, uptraining_figures
from gqa.report.page import again, document, facts_html, figures_html, section

COMMAND = "benchmark uptraining"
_TABLES = ("spread", "verdict", "cost", "recall", "positions")
_LEDE = (
    "A model with fewer KV heads is made from one with many, and then trained a little more, which is called"
    " <em>uptraining</em>; alpha is how much, as a share of what the model was trained on at first. How to begin, how"
    " much to train and what a step of it costs was measured here, as in figures 4 and 5 of Ainslie et al. 2023."
)


def render(record: Record) -> str:
    """The page; the same record always gives the same page. GqaError when the record is another's."""
    if record.command != COMMAND:
        raise GqaError("not a record of uptraining curves", got=f"a record of `gqa {record.command}`")
    tables: dict[str, Any] = {name: list(record.results.get(name) or ()) for name in _TABLES}
    if not all(isinstance(row, Mapping) for rows in tables.values() for row in rows):
        raise GqaError("a record of uptraining curves with a table that is none")
    verdicts = tables["verdict"]
    alpha = verdicts[0]["alpha"] if verdicts else 0.05
    figures = uptraining_figures
    trained = figures.alphas(tables["spread"], verdicts)
    begun = figures.beginnings(tables["spread"], alpha)
    cost, positions = figures.cost(tables["cost"]), recall_figures.positions(tables["positions"])
    sections = section("training", "What training gives back", "", figures_html(trained))
    sections += section("begin", "How to begin", "", figures_html([begun] if begun else []))
    sections += section("price", "What a step costs", "", figures_html([cost] if cost else []))
    far = [*recall_figures.recalled(tables["recall"]), *([positions] if positions else [])]
    sections += section("far", "What is found again far back", "", figures_html(far))
    blocks = [("What was asked", record.inputs), ("This machine", record.machine), ("Versions", record.versions)]
    if parent := record.results.get("recall_parent"):
        blocks.insert(1, ("The parent that recalls", parent))
    return document(
        record,
        title="GQA: uptraining curves",
        name="Uptraining curves",
        finding=_finding(verdicts),
        lede=_LEDE,
        figures=sections,
        how="How this was measured",
        method=facts_html(blocks, record.assumptions) + again("uptraining.json"),
    )


def _finding(verdicts: list[Mapping[str, Any]]) -> str:
    if not verdicts:
        return "What uptraining gives back was not measured."
    told = " and ".join(f"{_apart(row['times_control_mean'])} with {forms.heads(row['kv_heads'])}" for row in verdicts)
    share = forms.percent(verdicts[0]["alpha"])
    return (
        f"After refinement and {share} of the parent's training, perplexity is {told} than that of the parent"
        " trained on the same tokens."
    )


def _apart(times: float) -> str:
    return f"{forms.percent(abs(times - 1))} {'higher' if times > 1 else 'lower'}"
