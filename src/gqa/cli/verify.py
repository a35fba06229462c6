"""`gqa convert --verify`: is a converted folder still what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gqa.cli import output
from gqa.errors import GqaError
from gqa.record import Record

_EXAMPLES = """
gqa convert --verify ./my-gqa-model
gqa convert --verify ./my-mha-model ./my-gqa-model
gqa convert --verify ./my-gqa-model --json
"""
_SHOWN = 10
_BASIS: dict[str, str] = dict.fromkeys(("sound", "tensors", "files", "tensors_compared_with_parent"), "measured")


@click.command("convert", cls=output.Command, examples=_EXAMPLES)
@click.argument("folders", nargs=-1, required=True, metavar="[MODEL] OUT")
@output.json_option
@click.pass_context
def command(context: click.Context, folders: tuple[str, ...], as_json: bool) -> None:
    """--verify: read the converted folder OUT again and compare it with what was written.

    Every tensor is read: its bytes, shape and dtype, and that its values are finite. With MODEL, the parent it was
    converted from, what the conversion leaves alone is compared with it byte for byte. Exit code 1: something is off.
    """
    if not 1 <= len(folders) <= 2:
        raise GqaError("too many folders to verify", got=" ".join(folders), allowed="OUT, or MODEL and OUT")
    from gqa.convert.verify import verify

    model, out = folders[0] if len(folders) == 2 else None, folders[-1]
    source = output.open_checkpoint(model) if model else None
    with output.progress() as progress:
        report = verify(Path(out), source, progress)
    if as_json:
        inputs = {"out": out, "model": model, "verify": True}
        output.record(Record("convert", inputs, report, _BASIS))
    else:
        _print(report)
    if not report["sound"]:
        context.exit(1)


def _print(report: dict[str, Any]) -> None:
    differences = report["differences"]
    compared = report["tensors_compared_with_parent"]
    said = f"{report['tensors']} tensors in {report['files']} files read (measured)"
    said += f", {compared} of them compared with the parent's" if compared else ""
    if not differences:
        output.data(f"{report['out']}: as it was written; {said}")
        return
    output.data(f"{report['out']}: not as it was written, {len(differences)} differences; {said}")
    output.table(differences[:_SHOWN])
    if len(differences) > _SHOWN:
        output.data(f"... and {len(differences) - _SHOWN} more; --json lists them all")
