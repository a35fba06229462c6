"""`gqa claims`: do the published figures add up?"""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from gqa.cli import output
from gqa.plan.claims import claims
from gqa.record import read_record

EXAMPLES = """
gqa claims
gqa claims --study study/study.json
"""


@click.command(cls=output.Command, examples=EXAMPLES)
@click.option("--study", type=click.Path(path_type=Path), help="A study's record, for what only measurement tells.")
@output.json_option
def command(study: Path | None, as_json: bool) -> None:
    """Figures that articles quote about grouped-query attention, beside what the arithmetic gives."""
    record = claims(None if study is None else read_record(study, "study"))
    if as_json:
        output.record(record)
        return
    for row in record.results["claims"]:
        conditions = f" ({row['conditions']})" if row["conditions"] else ""
        output.data(_line(f"{row['article']}  {row['claim']}{conditions}", "", "     "))
        output.data(_line(f"{row['verdict'].upper()}: {row['computed']}", "     ", "     ") + "\n")
    for sentence in record.assumptions:
        output.data(_line(sentence, "- ", "  "))


def _line(text: str, first: str, rest: str) -> str:
    return textwrap.fill(text, 100, initial_indent=first, subsequent_indent=rest)
