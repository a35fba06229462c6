"""`gqa bench MODEL --memory SIZE`: serving density and a soak, asked for and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa.cli import output
from gqa.config import ModelShape, parse_config
from gqa.config.child import child_config
from gqa.config.shallow import shallow_config
from gqa.errors import GqaError
from gqa.record import Record
from gqa.source import Source
from gqa.units import format_bytes, format_seconds, parse_bytes, parse_seconds


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command was given, texts as they were typed."""

    memory: str
    block: int
    kv_dtype: str | None
    soak: str | None
    text: tuple[Path, ...]
    seed: int
    context: int
    dtype: str
    device: str
    repeats: int
    layers: int | None


def measure(source: Source, settings: Sequence[int], whole: Callable[[], Any] | None, asked: Asked) -> Record:
    """The record. whole: loads the model with its own weights, None where there are none."""
    seconds = None if asked.soak is None else parse_seconds(asked.soak)
    budget = parse_bytes(asked.memory)
    if asked.kv_dtype not in (None, asked.dtype, "int8"):
        raise GqaError(
            "keys and values are held as the model gives them, or in int8",
            got=f"--kv-dtype {asked.kv_dtype} with --dtype {asked.dtype}",
            allowed=f"{asked.dtype}, int8",
        )
    if asked.block < 1:
        raise GqaError("a block is a number of tokens", got=f"--block {asked.block}", allowed="1 or more")
    if asked.text and seconds is None:
        raise GqaError("--text is for prompts of a soak", hint="--soak 60m")

    from gqa.bench.density import Memory
    from gqa.bench.serving import Soaking, bench_serving

    whole_shape = parse_config(source.config, source.name)
    config = shallow_config(source.config, asked.layers or len(whole_shape.layers), source.name)
    dial = [_stop(config, source.name, kv_heads, asked) for kv_heads in settings]
    soaking = None
    if seconds is not None:
        text = _tokens(source, asked.text)
        make = whole or _stop(config, source.name, whole_shape.kv_heads, asked)[1]
        soaking = Soaking(make(), seconds, asked.seed, text)
    inputs = {
        "model": source.name,
        "layers": asked.layers,
        "memory_bytes": budget,
        "context_tokens": asked.context,
        "block_tokens": asked.block,
        "dtype": asked.dtype,
        "kv_dtype": asked.kv_dtype or asked.dtype,
        "soak_seconds": seconds,
        "soak_random_weights": None if soaking is None else whole is None,
        "text": [path.name for path in asked.text],
        "seed": asked.seed,
    }
    memory = Memory(budget, asked.block, int8=asked.kv_dtype == "int8")
    with output.progress() as progress:
        return bench_serving(
            dial,
            memory,
            asked.context,
            device=asked.device,
            soaking=soaking,
            repeats=asked.repeats,
            inputs=inputs,
            progress=progress,
        )


def passed(record: Record) -> bool:
    """Whether what fits is what was predicted, and the soak, if there was one, found nothing."""
    rows, soak = record.results["density"], record.results["soak"]
    exact = all(
        row["sequences_fit"] == row["sequences_predicted"] and row["pool_blocks"] == row["pool_blocks_predicted"]
        for row in rows
    )
    return exact and (soak is None or soak["passed"])


def show(record: Record) -> None:
    """The tables, without the machine's line and the assumptions."""
    inputs = record.inputs
    output.data(
        f"\nSequences of {inputs['context_tokens']:,} tokens in {format_bytes(inputs['memory_bytes'])} of"
        f" {inputs['kv_dtype']} keys and values, blocks of {inputs['block_tokens']} tokens, model in {inputs['dtype']}"
    )
    output.table([_row(row) for row in record.results["density"]])
    if record.results["soak"]:
        _show_soak(record.results["soak"], " with random weights" if inputs["soak_random_weights"] else "")


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    def rate(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:,.4g}"

    step, bound = row["seconds_per_step_p50"], row["tokens_per_second_bound"]
    return {
        "KV heads": str(row["kv_heads"]),
        "fit, predicted": f"{row['sequences_predicted']:,}",
        "measured": f"{row['sequences_fit']:,}",
        "step (measured)": "-" if step is None else format_seconds(step),
        "tokens per second": rate("tokens_per_second"),
        "of each": rate("tokens_per_second_each"),
        "at best (predicted)": rate("tokens_per_second_bound"),
        "of best": "-" if bound is None else f"{row['tokens_per_second'] / bound:.0%}",
    }


def _show_soak(soak: Mapping[str, Any], weights: str) -> None:
    wrong = soak["texts_wrong"]
    speed = "-" if soak["tokens_per_second"] is None else f"{soak['tokens_per_second']:,.4g}"
    output.data(
        f"\nSoak of {format_seconds(soak['seconds'])}{weights} (measured): {soak['sequences']:,} sequences came and"
        f" went, at most {soak['sequences_at_once']:,} at once, {soak['sequences_shared']:,} began in another's blocks;"
        f" {soak['new_tokens']:,} new tokens, {speed} per second"
    )
    output.data(
        f"- texts as when run alone: {soak['texts_equal']:,}; another token at a near tie: {soak['texts_near_tie']:,};"
        f" wrong: {wrong:,}"
    )
    output.data(f"- blocks free at the end: {soak['pool_blocks_free']:,} of {soak['pool_blocks']:,}")
    first, second = soak["resident_bytes_first_half"], soak["resident_bytes_second_half"]
    if first is None:
        output.data("- memory of the process: not told here")
    else:
        output.data(
            f"- memory of the process at most: {format_bytes(first)} in the first half, {format_bytes(second)} since"
            f" (growth allowed: {format_bytes(soak['resident_bytes_growth_allowed'])})"
        )
    output.data("passed" if soak["passed"] else "FAILED")


def _stop(config: Mapping[str, Any], name: str, kv_heads: int, asked: Asked) -> tuple[ModelShape, Callable[[], Any]]:
    """The shape at a stop of the dial, and what makes a model of it with random weights: its time is the same."""
    child = child_config(config, kv_heads)

    def make() -> Any:
        from gqa.bench.generation import random_model
        from gqa.bench.problem import TORCH_DTYPES

        return random_model(child, TORCH_DTYPES[asked.dtype]).to(asked.device)

    return parse_config(child, name), make


def _tokens(source: Source, paths: tuple[Path, ...]) -> Sequence[int]:
    if not paths:
        return ()
    if source.folder is None:
        raise GqaError("prompts from a text need the model's tokenizer", got=source.name, allowed="a model folder")
    from gqa.text import load_tokenizer, read_text

    tokenizer: Any = load_tokenizer(source.folder)
    return tokenizer.encode(read_text(paths), add_special_tokens=False, verbose=False)
