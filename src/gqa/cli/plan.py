"""`gqa plan`: what fewer KV heads would save."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import click

from gqa.cli import output
from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.hardware import devices, find_device
from gqa.plan import sweep
from gqa.record import Record
from gqa.source import bundled_names, open_source
from gqa.units import DTYPE_BYTES, dtype_bytes, format_bytes, format_seconds, parse_tokens

EXAMPLES = """
gqa plan llama-3-70b
gqa plan llama-3-70b --kv-heads 64,8,1 --context 128k --device "H100 SXM"
gqa plan ./my-model --context 32k --batch 16 --kv-dtype int8 --json
"""


def _list_and_leave(names: Callable[[], Any]) -> Callable[[click.Context, click.Parameter, bool], None]:
    def show(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            output.data("\n".join(names()))
            ctx.exit()

    return show


def _list_option(flag: str, names: Callable[[], Any], text: str) -> Callable:
    show = _list_and_leave(names)
    return click.option(flag, is_flag=True, is_eager=True, expose_value=False, callback=show, help=text)


@click.command(cls=output.Command, examples=EXAMPLES)
@click.argument("model")
@click.option("--kv-heads", metavar="N,N,...", help="Settings to look at.  [default: all divisors of the query heads]")
@click.option("--context", metavar="TOKENS", help="Tokens per request, such as 128k.  [default: the model's longest]")
@click.option("--batch", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Requests.")
@click.option("--kv-dtype", metavar="DTYPE", help=f"{', '.join(DTYPE_BYTES)}.  [default: as the weights, or bf16]")
@click.option("--weight-dtype", metavar="DTYPE", help="The same for the weights.  [default: from the config, or bf16]")
@click.option("--device", metavar="NAME", help="For the decode bound and what fits; see --devices.")
@click.option("--utilisation", metavar="SHARE", type=float, default=0.9, show_default=True, help="Of its memory.")
@click.option("--ignore-windows", is_flag=True, help="Count sliding-window layers as if they kept every token.")
@output.json_option
@_list_option("--models", bundled_names, "List the bundled shapes and leave.")
@_list_option("--devices", devices, "List the devices and leave.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    kv_heads: str | None,
    context: str | None,
    batch: int,
    kv_dtype: str | None,
    weight_dtype: str | None,
    device: str | None,
    utilisation: float,
    ignore_windows: bool,
    as_json: bool,
) -> None:
    """What each number of KV heads would take in memory and give in speed, by arithmetic alone.

    MODEL is a bundled shape such as llama-3-70b, a model folder, a config.json or a hub id.
    With --device, exits with 1 if no setting fits there.
    """
    for dtype in (kv_dtype, weight_dtype):
        if dtype is not None:
            dtype_bytes(dtype)
    source = open_source(model)
    record = sweep.plan(
        parse_config(source.config, source.name),
        kv_heads=None if kv_heads is None else parse_kv_heads(kv_heads),
        context=None if context is None else parse_tokens(context),
        batch=batch,
        kv_dtype=kv_dtype,
        weight_dtype=weight_dtype,
        device=None if device is None else find_device(device),
        utilisation=utilisation,
        ignore_windows=ignore_windows,
    )
    if as_json:
        output.record(record)
    else:
        _print(record)
    if not sweep.fits(record):
        output.note("no setting fits: a device with more memory, a shorter --context or a smaller --weight-dtype may")
        ctx.exit(1)


def parse_kv_heads(text: str) -> list[int]:
    """`64,8,1` -> [64, 8, 1]."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in numbers):
        raise GqaError("--kv-heads is not understood", got=repr(text), allowed="whole numbers with commas between")
    return [int(part) for part in numbers]


def _print(record: Record) -> None:
    model, inputs = record.results["model"], record.inputs
    heads = "latent attention" if model["kv_heads"] is None else f"{model['kv_heads']} KV heads"
    output.data(
        f"{model['name']}: {model['layers']} layers, {model['query_heads']} query heads, {heads},"
        f" head dim {model['head_dim']}"
    )
    requests = "1 request" if inputs["batch"] == 1 else f"{inputs['batch']} requests"
    on = f", on {inputs['device']}" if inputs["device"] else ""
    output.data(f"{requests} of {inputs['context']:,} tokens, {inputs['kv_dtype']} cache{on}\n")
    settings = record.results["settings"]
    output.table([_row(setting, bool(inputs["device"])) for setting in settings])
    if any(setting["is_current"] for setting in settings):
        output.data("* the model as it is")
    output.data("\nAll figures are predicted by arithmetic, none is measured.")
    for sentence in record.assumptions:
        output.data(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  "))


def _row(setting: Mapping[str, Any], with_device: bool) -> dict[str, str]:
    latent = setting["kv_heads"] is None
    row = {
        "KV heads": f"{'latent' if latent else setting['kv_heads']}{' *' if setting['is_current'] else ''}",
        "queries each": "-" if latent else str(setting["queries_per_kv_head"]),
        "KV per token": format_bytes(setting["kv_bytes_per_token"]),
        "KV cache": format_bytes(setting["kv_bytes"]),
        "of MHA": _share(setting["kv_bytes"], setting["kv_bytes_as_mha"]),
        "KV parameters": _count(setting["kv_projection_parameters"]),
        "weights": _known(setting["weight_bytes"], format_bytes),
    }
    if with_device:
        row["decode at best"] = _known(setting["decode_seconds_bound"], format_seconds)
        row["requests"] = _known(setting["max_concurrent_requests"], "{:,}".format)
        endless = setting["context_unlimited"]
        row["longest context"] = "no limit" if endless else _known(setting["max_context"], "{:,}".format)
    return row


def _known(value: Any, text: Callable[[Any], str]) -> str:
    return "unknown" if value is None else text(value)


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "unknown"
    return f"{parameters / 1e9:.3g} billion" if parameters >= 1e9 else f"{parameters / 1e6:.3g} million"


def _share(part: int, whole: int) -> str:
    return f"1/{whole // part}" if whole % part == 0 else f"{part / whole:.1%}"
