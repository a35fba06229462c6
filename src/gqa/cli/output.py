"""The only printer: data on stdout, progress, notes and errors on stderr, no colour without a terminal.

Of the processes that torchrun started, the first one prints.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gqa.errors import GqaError
from gqa.progress import Progress, silent
from gqa.record import Record

if TYPE_CHECKING:
    from gqa.source import Source


class Command(click.Command):
    """A click command whose help begins with examples: `@click.command(cls=Command, examples="...")`."""

    def __init__(self, *args: Any, examples: str, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*args, **kwargs)
        self.examples = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"Examples:\n{self.examples}\n\n")
        super().format_help(ctx, formatter)


def json_option(function: Any) -> Any:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)


def text_field_option(function: Any) -> Any:
    what = "Where .jsonl lines, .parquet rows and data sets have their text."
    return click.option("--text-field", metavar="NAME", default="text", show_default=True, help=what)(function)


def data(text: str) -> None:
    """Print a result on stdout."""
    _echo(text)


def piece(text: str) -> None:
    """Print a part of a result on stdout, as it is and at once."""
    _echo(text, nl=False)


def note(text: str) -> None:
    """Print a hint or a state on stderr."""
    _echo(text, err=True)


def error(error: GqaError) -> None:
    prefix = click.style("error:", fg="red", bold=True) if sys.stderr.isatty() else "error:"
    _echo(f"{prefix} {error}", err=True)


def record(record: Record) -> None:
    """Print a record as its JSON document."""
    _echo(record.to_json(), nl=False)


def table(rows: Sequence[Mapping[str, str]], *, title: str = "") -> None:
    """Print rows of ready-made texts; the keys of the first row are the column titles.
    The first column is aligned left, all others right, as figures are."""
    if title:
        data(title)
    if not rows:
        return
    columns = list(rows[0])
    widths = {c: max(len(line) for row in rows for line in (c, str(row[c]))) for c in columns}
    for cells in ({c: c for c in columns}, *rows):
        line = "  ".join(
            str(cells[c]).ljust(widths[c]) if i == 0 else str(cells[c]).rjust(widths[c]) for i, c in enumerate(columns)
        )
        data(line.rstrip())


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A progress callable: a bar per stage on a terminal, else a line at the start, every 30 s and at the end."""
    if not _first():
        yield silent
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def show_bar(stage: str, done: int, total: int, note: str = "") -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total, note=note)
                bars.update(tasks[stage], completed=done, total=total, note=note)

            yield show_bar
    else:
        last: dict[str, float] = {}

        def show_line(stage: str, done: int, total: int, note: str = "") -> None:
            now = time.monotonic()
            if stage not in last or done >= total or now - last[stage] > 30:
                last[stage] = now
                click.echo(f"{stage}: {done}/{total} {note}".rstrip(), err=True)

        yield show_line


def open_checkpoint(model: str) -> Source:
    """gqa.source's open_checkpoint; that a GGUF file is dequantised is shown on stderr."""
    from gqa import source

    with progress() as shown:
        return source.open_checkpoint(model, shown)


def _echo(text: str, **how: bool) -> None:
    if _first():
        click.echo(text, **how)  # pyright: ignore[reportArgumentType]


def _first() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
