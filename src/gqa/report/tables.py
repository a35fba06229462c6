"""HTML tables: every text escaped, gaps said in words, wide ones scroll in a box of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from gqa.report.forms import NOT_MEASURED


@dataclasses.dataclass(frozen=True)
class Table:
    """Ready-made texts; columns named in `left` hold words and are aligned left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[str] = frozenset()


def rows_table(
    columns: Mapping[str, tuple[str, Callable[[Any], str]]], rows: Sequence[Mapping[str, Any]], gap: str = NOT_MEASURED
) -> Table:
    """A table of record rows: field -> (column title, form). A column without any figure is left out."""
    kept = {field: of for field, of in columns.items() if any(row.get(field) is not None for row in rows)}
    texts = [[_cell(row.get(field), form, gap) for field, (_, form) in kept.items()] for row in rows]
    return Table([title for title, _ in kept.values()], texts, frozenset(t for t, form in kept.values() if form is str))


def html(table: Table, label: str) -> str:
    """The table in a box that scrolls sideways on a narrow screen and can be reached by keyboard."""
    places = [' class="left"' if column in table.left else "" for column in table.columns]
    head = "".join(f'<th scope="col"{place}>{escape(c)}</th>' for c, place in zip(table.columns, places, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{place}>{escape(cell)}</td>' for cell, place in zip(row, places, strict=True))}</tr>\n"
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _cell(value: Any, form: Callable[[Any], str], gap: str) -> str:
    if value is None:
        return gap
    if form is str:
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return gap
    return form(value)
