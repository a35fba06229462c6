"""A record as markdown: a line per shape, ours in full, the peers as multiples of our time.

`markdown` is for benchmarks/cpu.py; gpu_tables.py makes the tables of benchmarks/gpu.py of the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gqa.bench.kernels import OURS
from gqa.record import Record
from gqa.units import format_seconds


def markdown(record: Record) -> str:
    """Everything measured, in up to three tables under a line about the machine."""
    machine = record.results["machine"]
    parts = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['simd']}; reads"
        f" {machine['read_bytes_per_second'] / 1e9:.3g} GB/s, {machine['sgemm_flops_per_second'] / 1e9:.3g} GFLOP/s by"
        f" torch's sgemm, {machine['fp32_flops_per_second'] / 1e9:.3g} by the fastest fp32 product. Times are ours"
        " (medians); the peers' are multiples of ours. The roofline is max(KV bytes / read bandwidth, FLOPs / sgemm),"
        " the limit the same with the fastest product.",
    ]
    attention = record.results["attention"]
    decode = [row for row in attention if row["query_tokens"] == 1]
    prompts = [row for row in attention if row["query_tokens"] > 1]
    for rows in (decode, prompts):
        if rows:
            parts.append(table(attention_lines(rows, _shares)))
    if record.results["generation"]:
        parts.append(table(_generation_lines(record.results["generation"])))
    parts += [f"Absent: {name}, {reason}." for name, reason in record.results["absent"].items()]
    return "\n\n".join(parts)


def _shares(row: Mapping[str, Any]) -> dict[str, str]:
    return {f"of {bound}": decimal(row, f"fraction_of_{bound}") for bound in ("roofline", "limit")}


def decimal(row: Mapping[str, Any], name: str) -> str:
    """A fraction of the row, if it has that one."""
    return f"{row[name]:.2f}" if name in row else "-"


def attention_lines(
    rows: Sequence[Mapping[str, Any]], reached: Callable[[Mapping[str, Any]], dict[str, str]]
) -> list[dict[str, str]]:
    """Rows come contender by contender; a line gathers those of one problem. `reached` tells of one of our rows what
    the machine's limits make of it, the same titles for every row."""
    peers = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != OURS))
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        shape = ("query_heads", "kv_heads", "head_dim", "context_tokens", "query_tokens", "batch", "dtype", "backward")
        line = lines.setdefault(
            tuple(row[name] for name in shape),
            {
                "heads": f"{row['query_heads']}/{row['kv_heads']}",
                "D": str(row["head_dim"]),
                "S": f"{row['context_tokens']:,}",
                "batch": str(row["batch"]),
                "dtype": row["dtype"] + (" forward and backward" if row["backward"] else ""),
                "gqa": "",
                **dict.fromkeys(reached(row), ""),
                **dict.fromkeys(peers, "-"),
            },
        )
        timed = row["status"] == "timed"
        if row["contender"] == OURS:
            line["gqa"] = format_seconds(row["seconds_p50"]) if timed else row["status"]
            line |= reached(row)
        elif row["status"] != "unserved":
            line[row["contender"]] = _multiple(row) if timed else row["status"]
    return list(lines.values())


def _multiple(row: Mapping[str, Any]) -> str:
    if row["times_of_gqa"] is None:
        return format_seconds(row["seconds_p50"])
    return f"{row['times_of_gqa']:.3g}x" if row["times_of_gqa"] < 100 else f"{row['times_of_gqa']:.0f}x"


def _generation_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["dtype"], row["context_tokens"]),
            {"model": f"{row['layers']} layers, {row['dtype']}", "context": f"{row['context_tokens']:,}"},
        )
        line[row["contender"]] = (
            f"{format_seconds(row['seconds_per_token_p50'])} per token" if row["status"] == "timed" else row["status"]
        )
        if row["contender"] != OURS:
            ratio = row.get("times_of_gqa")
            line["faster"] = "-" if ratio is None else f"{ratio:.2f}x"
    return list(lines.values())


def table(lines: Sequence[Mapping[str, str]]) -> str:
    titles = list(lines[0])
    rule = "|" + "---|" * len(titles)
    rows = [titles, *([line[title] for title in titles] for line in lines)]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, rule, *body])
