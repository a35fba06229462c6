"""`gqa env`: what a bug report needs."""

from __future__ import annotations

import click

from gqa import record
from gqa.cli import output
from gqa.units import format_bytes


@click.command(cls=output.Command, examples="gqa env\ngqa env --json")
@output.json_option
def command(as_json: bool) -> None:
    """Print the machine and the versions that decide what gqa does here."""
    document = record.Record(command="env", inputs={}, results={}, basis={})
    if as_json:
        output.record(document)
        return
    machine = dict(document.machine)
    machine["memory"] = format_bytes(machine.pop("memory_bytes") or 0)
    rows = {**document.versions, **machine}
    output.table([{"what": name, "value": str(value)} for name, value in rows.items()])
