"""`gqa bench`: how fast attention is on this machine, and how fast it could be."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gqa.cli import density, output
from gqa.cli.plan import parse_kv_heads
from gqa.config import ModelShape, check_kv_heads, kv_head_choices, parse_config
from gqa.errors import GqaError
from gqa.record import Record
from gqa.source import Source, open_source
from gqa.units import DTYPE_BYTES, dtype_bytes, format_bytes, format_seconds, parse_tokens

if TYPE_CHECKING:
    from gqa.bench.problem import Problem

HEADS, HEAD_DIM, CONTEXT, DTYPE = "32", 128, "8k", "bf16"
OURS = "gqa"

EXAMPLES = """
gqa bench
gqa bench --heads 64/8 --head-dim 128 --context 32k --dtype fp32
gqa bench ./my-model --context 8k
gqa bench llama-3.2-1b --layers 4 --context 32k --dtype bf16
gqa bench --device cuda --batch 32 --heads 32/8
gqa bench ./my-model --memory 256MiB --context 2k --kv-heads 8,4,2,1
gqa bench ./my-model --memory 256MiB --context 2k --soak 60m --text corpus.txt
"""


@click.command(cls=output.Command, examples=EXAMPLES)
@click.argument("model", required=False)
@click.option(
    "--heads",
    metavar="N or N/H",
    help=f"Query heads, or query and KV heads such as 64/8.  [default: the model's, or {HEADS}]",
)
@click.option("--kv-heads", metavar="N,N,...", help="Settings to time.  [default: every divisor of the query heads]")
@click.option("--head-dim", metavar="D", type=int, help=f"At most 256.  [default: the model's, or {HEAD_DIM}]")
@click.option("--context", metavar="TOKENS", default=CONTEXT, show_default=True, help="Keys per sequence.")
@click.option("--batch", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@click.option("--dtype", metavar="DTYPE", help=f"{', '.join(DTYPE_BYTES)}.  [default: the model's, or {DTYPE}]")
@click.option("--prefill", is_flag=True, help="A whole causal prompt instead of one token.")
@click.option("--layers", metavar="N", type=int, help="Also run N layers of MODEL's shape, with random weights.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda.  [default: cuda where torch finds a GPU, else cpu]")
@click.option("--impl", default="auto", show_default=True, help="The implementation to time, as in gqa.attention.")
@click.option("--repeats", metavar="N", type=click.IntRange(min=1), default=20, show_default=True, help="Timed runs.")
@click.option(
    "--memory", metavar="SIZE", help="Measure how many sequences of MODEL fit in so much cache, such as 256MiB."
)
@click.option("--kv-dtype", metavar="DTYPE", help="Of that cache: int8.  [default: the dtype]")
@click.option("--block", metavar="TOKENS", type=click.IntRange(min=1), help="Of that cache.  [default: 16]")
@click.option("--soak", metavar="TIME", help="Then serve sequences that come and go for so long, such as 60m.")
@click.option("--text", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Their prompts.")
@click.option("--seed", metavar="N", type=int, help="Of lengths and prompts in the soak.  [default: 0]")
@output.json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    heads: str | None,
    kv_heads: str | None,
    head_dim: int | None,
    context: str,
    batch: int,
    dtype: str | None,
    prefill: bool,
    layers: int | None,
    device: str | None,
    impl: str,
    repeats: int,
    memory: str | None,
    kv_dtype: str | None,
    block: int | None,
    soak: str | None,
    text: tuple[Path, ...],
    seed: int | None,
    as_json: bool,
) -> None:
    """Measure attention on this machine: time per setting of the KV heads, the share of what the machine could do,
    and what torch takes for the same.

    MODEL, a bundled shape, a folder, a GGUF file or a hub id, gives the shape. If it is a folder with weights, a GGUF
    file that another command has dequantised before, or with --layers, tokens per second of the whole model follow,
    against transformers' default.

    With --memory, serving density instead: how many sequences of the context a real paged cache of that size holds at
    each setting, against the plan, and their tokens per second together; random weights, on which neither depends.
    --soak serves MODEL itself and compares every text with the one it gives alone. Exits with 1 where the plan was
    wrong or the soak found something.
    """
    _check_serving(ctx, model, memory)
    source = open_source(model) if model else None
    shape = parse_config(source.config, source.name) if source else None
    if shape and (heads is not None or head_dim is not None):
        raise GqaError("MODEL gives the heads", got="--heads or --head-dim", hint="leave out MODEL or these options")
    if layers is not None and not source:
        raise GqaError("--layers goes with a MODEL", hint="gqa bench llama-3.2-1b --layers 4")
    dtype = dtype or (shape and shape.weight_dtype) or DTYPE
    dtype_bytes(dtype)
    tokens = parse_tokens(context)
    whole = source is not None and (layers is not None or memory is not None or _has_weights(source))
    if whole and dtype == "int8":
        raise GqaError("a model runs in fp32, bf16 or fp16", got="--dtype int8", allowed="fp32, bf16, fp16")
    query_heads, settings = _settings(shape, heads, kv_heads)

    from gqa.bench.device import choose_device
    from gqa.bench.problem import Problem

    device = choose_device(device)
    if source and memory is not None:
        asked = density.Asked(
            memory, block or 16, kv_dtype, soak, text, seed or 0, tokens, dtype, device, repeats, layers
        )  # fmt: skip
        own = (lambda: _model(source, None, dtype, device)) if layers is None and _has_weights(source) else None
        record = density.measure(source, settings, own, asked)
        if as_json:
            output.record(record)
        else:
            _print_machine(record)
            density.show(record)
            _print_assumptions(record)
        ctx.exit(0 if density.passed(record) else 1)

    problems = [
        Problem(
            query_heads=query_heads,
            kv_heads=setting,
            head_dim=shape.head_dim if shape else HEAD_DIM if head_dim is None else head_dim,
            context_tokens=tokens,
            query_tokens=tokens if prefill else 1,
            batch=batch,
            dtype=dtype,
        )
        for setting in settings
    ]
    loaded = _model(source, layers, dtype, device) if source and whole else None

    from gqa.bench.run import bench

    inputs = {"model": model, "layers": layers, "context_tokens": tokens, "dtype": dtype}
    with output.progress() as progress:
        record = bench(
            problems,
            device=device,
            impl=impl,
            model=loaded,
            random_weights=layers is not None,
            contexts=(tokens,),
            repeats=repeats,
            inputs=inputs,
            progress=progress,
        )
    if as_json:
        output.record(record)
    else:
        _print(record, problems[0])
        if source and not whole:
            output.note(f"no weights here: gqa bench {model} --layers 4 also times whole layers, with random ones")


def _settings(shape: ModelShape | None, heads: str | None, kv_heads: str | None) -> tuple[int, list[int]]:
    """The query heads, and the numbers of KV heads to time, most first."""
    given: list[int] = []
    if shape is None:
        parts = (heads or HEADS).split("/")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() and 0 < len(part) < 7 for part in parts):
            raise GqaError("--heads is not understood", got=repr(heads), allowed="query heads, or query/KV heads")
        query_heads, *given = map(int, parts)
        if query_heads == 0:
            raise GqaError("--heads is not understood", got=repr(heads), allowed="at least 1 query head")
        if given and kv_heads:
            raise GqaError("the KV heads are given twice", got=f"--heads {heads} and --kv-heads {kv_heads}")
    else:
        if shape.is_latent:
            raise GqaError(f"{shape.name} uses latent attention, which has no KV heads", allowed="grouped attention")
        query_heads = shape.query_heads
    choices = kv_head_choices(query_heads)
    wanted = given or (parse_kv_heads(kv_heads) if kv_heads else sorted(choices, reverse=True))
    for setting in wanted:
        if shape:
            check_kv_heads(shape, setting)
        elif setting not in choices:
            raise GqaError(
                f"{setting} KV heads do not divide {query_heads} query heads",
                allowed=", ".join(map(str, choices)) or "1 or more",
            )
    return query_heads, wanted


def _has_weights(source: Source) -> bool:
    return source.folder is not None and any(source.folder.glob("*.safetensors"))


def _model(source: Source, layers: int | None, dtype: str, device: str) -> Any:
    """The model with its own weights, or some layers of its shape with random ones, on the device."""
    from gqa.bench.problem import TORCH_DTYPES

    if layers is None:
        from gqa.evaluate import load_model

        assert source.folder is not None
        return load_model(source.folder, dtype=TORCH_DTYPES[dtype], device=device)
    from gqa.bench.generation import random_model
    from gqa.config.shallow import shallow_config

    config = shallow_config(source.config, layers, source.name)
    output.note(f"making {layers} layers of {source.name} with random weights")
    return random_model(config, TORCH_DTYPES[dtype]).to(device)


def _check_serving(ctx: click.Context, model: str | None, memory: str | None) -> None:
    """Options of the one kind of question do not go with the other."""
    about_attention = ("heads", "head_dim", "batch", "prefill", "impl")
    about_serving = ("kv_dtype", "block", "soak", "text", "seed")
    given = [
        "--" + name.replace("_", "-")
        for name in (about_serving if memory is None else about_attention)
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if memory is not None and model is None:
        raise GqaError("--memory goes with a MODEL", hint="gqa bench ./my-model --memory 256MiB --context 2k")
    if given and memory is None:
        raise GqaError("serving density needs a memory to fill", got=", ".join(given), hint="--memory 256MiB")
    if given:
        raise GqaError("--memory measures the whole MODEL", got=", ".join(given), hint=f"leave out {', '.join(given)}")


def _print(record: Record, problem: Problem) -> None:
    _print_machine(record)
    rows = record.results["attention"]
    queries = f"a causal prompt of {problem.query_tokens:,} tokens" if problem.causal else "one token per sequence"
    output.data(
        f"\nAttention of {problem.query_heads} query heads of {problem.head_dim}, batch {problem.batch},"
        f" {problem.dtype}: {queries}, {problem.context_tokens:,} keys (measured)"
    )
    output.table(_attention_rows(rows))
    for row in rows:
        if row["status"] in ("wrong", "failed") or (row["contender"] == OURS and row["status"] == "unserved"):
            output.data(f"{row['contender']} at {row['kv_heads']} KV heads is {row['status']}: {row['reason']}")
    if record.results["generation"]:
        first = record.results["generation"][0]
        weights = " with random weights" if record.inputs["layers"] else ""
        output.data(f"\nA model of {first['layers']} layers{weights}, {first['dtype']}, batch 1 (measured)")
        output.table([_generation_row(row) for row in record.results["generation"]])
    _print_assumptions(record)


def _print_machine(record: Record) -> None:
    machine = record.results["machine"]
    output.data(_gpu(machine) if record.inputs["device"] == "cuda" else _cpu(machine))


def _print_assumptions(record: Record) -> None:
    output.data("")
    for sentence in record.assumptions:
        output.data(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  "))


def _cpu(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['simd']}: reads"
        f" {machine['read_bytes_per_second'] / 1e9:.3g} GB/s, multiplies fp32 matrices at"
        f" {machine['fp32_flops_per_second'] / 1e9:.3g} GFLOP/s, by torch's sgemm"
        f" {machine['sgemm_flops_per_second'] / 1e9:.3g} (measured)"
    )


def _gpu(machine: Mapping[str, Any]) -> str:
    dtypes = ("bf16", "fp16", "fp32")
    rates = ", ".join(f"{dtype} {machine[f'{dtype}_flops_per_second'] / 1e12:.3g}" for dtype in dtypes)
    return (
        f"{machine['name']}, {machine['multiprocessors']} multiprocessors: copies"
        f" {machine['copy_bytes_per_second'] / 1e9:,.0f} GB/s, bytes read and written, reads"
        f" {machine['read_bytes_per_second'] / 1e9:,.0f} GB/s, multiplies matrices at {rates} TFLOP/s (measured)"
    )


def _attention_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line per number of KV heads: ours in full, the others as a multiple of our time."""
    lines: dict[int, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(
            row["kv_heads"],
            {
                "KV heads": str(row["kv_heads"]),
                "queries each": str(row["query_heads"] // row["kv_heads"]),
                "KV read": format_bytes(row["kv_bytes"]),
            },
        )
        timed = row["status"] == "timed"
        if row["contender"] == OURS:
            line["by"] = row.get("note") or row["status"]
            line["time"] = format_seconds(row["seconds_p50"]) if timed else "-"
            line["20 to 80 %"] = _spread(row) if timed else "-"
            line |= _reached(row)
        elif not timed:
            line[row["contender"]] = row["status"]
        elif row["times_of_gqa"] is None:
            line[row["contender"]] = format_seconds(row["seconds_p50"])
        else:
            line[row["contender"]] = f"{row['times_of_gqa']:.2f}x"
    return list(lines.values())


def _reached(row: Mapping[str, Any]) -> dict[str, str]:
    """The rate of one of our rows, and its shares of what there is: of other things on a GPU, and for prompts there."""
    if row["device"] == "cpu":
        cells, shares = {}, ("roofline", "limit")
    elif row["query_tokens"] > 1:
        cells, shares = {"TFLOP/s": ("flops_per_second", 1e12)}, ("matrix",)
    else:
        cells, shares = {"GB/s": ("kv_bytes_per_second", 1e9)}, ("copy", "datasheet", "limit")
    texts = {title: f"{row[name] / unit:,.0f}" if name in row else "-" for title, (name, unit) in cells.items()}
    fractions = {f"of {share}": row.get(f"fraction_of_{share}") for share in shares}
    return texts | {title: "-" if value is None else f"{value:.0%}" for title, value in fractions.items()}


def _spread(row: Mapping[str, Any]) -> str:
    return f"{format_seconds(row['seconds_p20'])} to {format_seconds(row['seconds_p80'])}"


def _generation_row(row: Mapping[str, Any]) -> dict[str, str]:
    timed = row["status"] == "timed"
    ratio = row.get("times_of_gqa")
    return {
        "way": row["contender"],
        "context": f"{row['context_tokens']:,}",
        "cache": format_bytes(row["cache_bytes_measured"]),
        "time per token": format_seconds(row["seconds_per_token_p50"]) if timed else row["status"],
        "tokens per second": f"{row['tokens_per_second']:.3g}" if timed else "-",
        "of our time": "-" if ratio is None else f"{ratio:.2f}x",
    }
