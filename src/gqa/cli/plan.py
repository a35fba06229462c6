"""`gqa plan`: what fewer KV heads would save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gqa.cli import output, plan_table
from gqa.config import ModelShape, parse_config
from gqa.errors import GqaError
from gqa.hardware import Device, devices, find_device
from gqa.plan import sweep
from gqa.plan.check import check
from gqa.plan.engines import ENGINES, find_engine
from gqa.plan.kv_dtype import KV_DTYPES, kv_dtype
from gqa.plan.weights import Stored
from gqa.record import Record, write_text_atomic
from gqa.source import Source, bundled_names, open_source
from gqa.units import DTYPE_BYTES, dtype_bytes, parse_bytes, parse_rate, parse_tokens
from gqa.weights.sizes import stored_bytes

EXAMPLES = """
gqa plan llama-3-70b
gqa plan llama-3-70b --kv-heads 64,8,1 --context 128k --device "H100 SXM" --tensor-parallel 4
gqa plan llama-2-7b --context 4k --requests 16 --device L4
gqa plan ./my-model --context 32k --engine vllm --device "RTX 4090" --reserve 2GiB --json
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
@click.argument("model", required=False)
@click.option("--kv-heads", metavar="N,N,...", help="Settings to look at.  [default: all divisors of the query heads]")
@click.option("--context", metavar="TOKENS", help="Tokens per request, such as 128k.  [default: the model's longest]")
@click.option("--batch", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Requests.")
@click.option("--requests", metavar="N", type=click.IntRange(min=1), help="Recommend a setting that holds so many.")
@click.option("--kv-dtype", metavar="DTYPE", help=f"{', '.join(KV_DTYPES)}.  [default: as the weights, or bf16]")
@click.option("--weight-dtype", metavar="DTYPE", help=f"{', '.join(DTYPE_BYTES)}.  [default: the config's, or bf16]")
@click.option("--weights", metavar="SIZE", help="Their bytes, such as 4.9GiB.  [default: of the files, or the shape]")
@click.option("--device", metavar="NAME", help="For bounds and what fits: see --devices; `this` measures this machine.")
@click.option("--memory", metavar="SIZE", help="The device's memory, such as 24GiB, if it is not in the list.")
@click.option("--bandwidth", metavar="RATE", help="The memory's bandwidth, such as 936GB/s.")
@click.option("--flops", metavar="RATE", help="The device's dense matrix rate, such as 71TFLOP/s.")
@click.option("--utilisation", metavar="SHARE", type=float, help="Of its memory.  [default: the engine's]")
@click.option("--reserve", metavar="SIZE", help="Of that, for activations and the engine itself.  [default: none]")
@click.option("--cache-memory", metavar="SIZE", help="Memory of the cache on each device, if it is known.")
@click.option("--engine", metavar="NAME", default="contiguous", show_default=True, help=f"{', '.join(ENGINES)}.")
@click.option("--block", metavar="TOKENS", type=int, help="The engine's block or page.  [default: the engine's]")
@click.option("--batched-tokens", metavar="N", type=int, help="The most of a step.  [default: the engine's]")
@click.option("--tensor-parallel", "ranks", metavar="N", type=int, default=1, show_default=True, help="Devices.")
@click.option("--ignore-windows", is_flag=True, help="Count sliding-window layers as if they kept every token.")
@click.option("--details", is_flag=True, help="Also print work, traffic and training.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Also write a page with the dial.")
@click.option("--check", "checks", is_flag=True, help="Compute logged cases (MODEL: a file of them) and compare.")
@output.json_option
@_list_option("--models", bundled_names, "List the bundled shapes and leave.")
@_list_option("--devices", devices, "List the devices and leave.")
@click.pass_context
def command(ctx: click.Context, model: str | None, *, checks: bool, as_json: bool, **options: Any) -> None:
    """What each number of KV heads would take in memory and give in speed, by arithmetic alone.

    MODEL is a bundled shape such as llama-3-70b, a model folder, a config.json, a GGUF file, the preset smollm2-135m or
    a hub id. A GGUF file is planned as what gqa makes of it: a checkpoint in bf16.
    With a device, exits with 1 if no setting fits there; with --requests, if none holds so many.
    """
    if checks:
        _check(ctx, model, as_json)
        return
    if model is None:
        raise GqaError(
            "which model?", allowed="a bundled shape, a model folder, a config.json, a GGUF file or a hub id"
        )
    record = _plan(open_source(model), options)
    if options["html"] is not None:
        from gqa.report.plan_page import render

        write_text_atomic(options["html"], render(record))
        output.note(f"wrote {options['html']}")
    if as_json:
        output.record(record)
    else:
        plan_table.show(record, details=options["details"])
    if not sweep.fits(record):
        advice = record.results["recommendation"]
        if advice is None:
            output.note("no setting fits: more memory, a shorter --context or a smaller --weight-dtype may help")
        ctx.exit(1)


def _plan(source: Source, options: dict[str, Any]) -> Record:
    if options["weight_dtype"] is not None:
        dtype_bytes(options["weight_dtype"])
    if options["kv_dtype"] is not None:
        kv_dtype(options["kv_dtype"])
    shape = parse_config(source.config, source.name)
    return sweep.plan(
        shape,
        kv_heads=None if options["kv_heads"] is None else parse_kv_heads(options["kv_heads"]),
        context=None if options["context"] is None else parse_tokens(options["context"]),
        batch=options["batch"],
        requests=options["requests"],
        kv_dtype=options["kv_dtype"],
        weight_dtype=options["weight_dtype"],
        stored=_stored(source, shape, options),
        device=_device(options),
        utilisation=options["utilisation"],
        reserve=_bytes(options["reserve"]) or 0,
        cache_memory=_bytes(options["cache_memory"]),
        engine=find_engine(options["engine"], block=options["block"], batched_tokens=options["batched_tokens"]),
        ranks=options["ranks"],
        ignore_windows=options["ignore_windows"],
        alternatives=options["html"] is not None,
    )


def parse_kv_heads(text: str) -> list[int]:
    """`64,8,1` -> [64, 8, 1]."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in numbers):
        raise GqaError("--kv-heads is not understood", got=repr(text), allowed="whole numbers with commas between")
    return [int(part) for part in numbers]


def _stored(source: Source, shape: ModelShape, options: dict[str, Any]) -> Stored | None:
    """The weights' size as told, or as the folder's headers say; None to count parameters."""
    told = options["weights"]
    if told is not None and options["weight_dtype"] is not None:
        raise GqaError("--weights and --weight-dtype both say how large the weights are", hint="leave out one")
    if options["weight_dtype"] is not None:
        return None
    attention = shape.attention
    rows = sum(layer.kv_heads * (layer.head_dim + layer.v_head_dim) for layer in attention)
    queries = sum(layer.query_heads * layer.head_dim for layer in attention)
    found = stored_bytes(source.folder, rows / (rows + queries or 1)) if source.folder else None
    if told is None:
        return None if found is None else Stored(*found)
    size = parse_bytes(told)
    share = found[1] / found[0] if found and found[0] else sweep.kv_projection_share(shape)
    return Stored(size, size * share)


def _device(options: dict[str, Any]) -> Device | None:
    """The device of the list, or this machine, or one described by its figures; the figures given go first."""
    name, memory = options["device"], _bytes(options["memory"])
    rates = {key: None if options[key] is None else parse_rate(options[key], unit) for key, unit in _RATES.items()}
    if name is None and memory is None and not any(rates.values()):
        return None
    if name is not None and name.lower() == "this":
        from gqa.bench.this_device import measure_this_device

        base = measure_this_device()
    elif name is not None:
        base = find_device(name)
    else:
        base = None
    return Device.described(base, memory, rates["bandwidth"], rates["flops"])


_RATES = {"bandwidth": "B/s", "flops": "FLOP/s"}


def _bytes(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


def _check(ctx: click.Context, path: str | None, as_json: bool) -> None:
    record = check(None if path is None else Path(path))
    if as_json:
        output.record(record)
    else:
        plan_table.show_check(record)
    if record.results["wrong"]:
        ctx.exit(1)
