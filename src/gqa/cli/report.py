"""`gqa report`: a study's or a plan's record as one offline HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from gqa.cli import output
from gqa.errors import GqaError
from gqa.record import read_record, write_text_atomic


@click.command(
    cls=output.Command,
    examples="gqa report study/study.json\ngqa report study/study.json --out page.html",
)
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page to write.  [default: report.html beside RECORD]")
def command(record: Path, out: Path | None) -> None:
    """Make the page from the RECORD of `gqa study`, of `gqa plan --html FILE --json`, or of a benchmark of
    uptraining, scaling or quality on a real model."""
    from gqa.report import page as study_page
    from gqa.report import plan_page, real_page, scaling_page, uptraining_page

    out = out or record.with_name("report.html")
    read = read_record(record)
    pages = {page.COMMAND: page for page in (uptraining_page, scaling_page, real_page)} | {"plan": plan_page}
    page = pages.get(read.command, study_page).render(read)
    try:
        write_text_atomic(out, page)
    except OSError as error:
        raise GqaError("the page cannot be written", got=f"{out}: {error.strerror}") from None
    output.note(f"wrote {out} ({len(page.encode()) / 1000:.0f} kB)")
