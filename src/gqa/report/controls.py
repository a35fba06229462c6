"""Small parts of the dial as HTML: a choice, a big number."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def select(
    name: str, label: str, options: Mapping[str, str], *, choice: bool = False, chosen: str | None = None
) -> str:
    """A select element; `choice`: one of those that decide which figures the dial shows."""
    if not options:
        return ""
    body = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(text)}</option>'
        for value, text in options.items()
    )
    mark = " data-choice" if choice else ""
    return f'<select id="{name}" aria-label="{label}"{mark}>{body}</select>'


def big_number(
    title: str, field: str, note: str, basis: str | None, share: str | None = None, control: str = ""
) -> str:
    dot = f' <span class="basis {basis}" role="img" aria-label="{basis}" title="{basis}"></span>' if basis else ""
    bar = f'<div class="bar" data-share="{share}"><i></i></div>' if share else ""
    return (
        f'<div><dt>{title} {control}{dot}</dt><dd><div class="big" data-field="{field}"></div>{bar}'
        f'<div class="small" data-field="{note}"></div></dd></div>\n'
    )
