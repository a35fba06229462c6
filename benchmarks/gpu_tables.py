"""A record of benchmarks/gpu.py as markdown: the goals, the telling rows, the prompts and their memory, every shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_goals import goals
from gpu_rows import dial, dtypes, headline_decode
from tables import attention_lines, decimal, table

from gqa.bench.problem import Problem
from gqa.record import Record
from gqa.units import MIB

_FIELDS = tuple(field.name for field in dataclasses.fields(Problem))


def markdown(record: Record) -> str:
    """Everything measured, under a line about the machine, and what was not."""
    machine, attention = record.results["machine"], record.results["attention"]
    telling = {problem_of(row) for row in attention} & {*headline_decode(), *dial(), *dtypes()}
    decode = [row for row in attention if row["query_tokens"] == 1]
    prompts = [row for row in attention if row["query_tokens"] > 1]
    parts = [
        _about(machine),
        _titled("Goals", [{"goal": goal.text, "found": goal.found, "met": goal.verdict} for goal in goals(attention)]),
        _titled("Decode", attention_lines([row for row in decode if problem_of(row) in telling], _memory)),
        _titled("Prompts", attention_lines(prompts, _matrix)),
        _titled("What a backward pass allocates beside its gradients, MiB", _extra_lines(prompts)),
        _titled("Decode, every other shape", attention_lines(_others(decode, telling), _memory)),
    ]
    results = record.results
    parts += [f"Absent: {name}, {reason}." for name, reason in results["absent"].items()]
    for title, key in (("Not reached", "not_reached"), ("Ended the process", "crashed"), ("Too large", "too_large")):
        if results[key]:
            parts.append(f"{title}: {'; '.join(results[key])}.")
    if results["tests"]:
        parts.append(f"Tests on this GPU: {results['tests']}.")
    return "\n\n".join(part for part in parts if part)


def problem_of(row: Mapping[str, Any]) -> Problem:
    return Problem(**{name: row[name] for name in _FIELDS})


def _others(rows: Sequence[Mapping[str, Any]], telling: set[Problem]) -> list[Mapping[str, Any]]:
    return [row for row in rows if problem_of(row) not in telling]


def _about(machine: Mapping[str, Any]) -> str:
    sheet = machine["datasheet_bytes_per_second"]
    by_sheet = "" if sheet is None else f" (datasheet {sheet / 1e9:,.0f})"
    bf16, fp16, fp32 = (f"{machine[f'{dtype}_flops_per_second'] / 1e12:,.0f}" for dtype in ("bf16", "fp16", "fp32"))
    return (
        f"{machine['name']}, {machine['multiprocessors']} multiprocessors, {machine['cache_bytes'] / MIB:.0f} MiB of"
        f" L2; copies {machine['copy_bytes_per_second'] / 1e9:,.0f} GB/s, bytes read and written{by_sheet}, reads"
        f" {machine['read_bytes_per_second'] / 1e9:,.0f} GB/s; multiplies matrices at {bf16} TFLOP/s in bf16, {fp16} in"
        f" fp16, {fp32} in fp32. Times are ours (medians); the peers' are multiples of ours. GB/s are K and V over the"
        " time."
    )


def _titled(title: str, lines: Sequence[Mapping[str, str]]) -> str:
    return f"{title}\n\n{table(lines)}" if lines else ""


def _memory(row: Mapping[str, Any]) -> dict[str, str]:
    rate = row.get("kv_bytes_per_second")
    bounds = ("copy", "datasheet", "limit")
    return {"GB/s": "-" if rate is None else f"{rate / 1e9:,.0f}"} | {
        f"of {bound}": decimal(row, f"fraction_of_{bound}") for bound in bounds
    }


def _matrix(row: Mapping[str, Any]) -> dict[str, str]:
    rate = row.get("flops_per_second")
    return {
        "TFLOP/s": "-" if rate is None else f"{rate / 1e12:,.0f}",
        "of torch.mm": decimal(row, "fraction_of_matrix"),
    }


def _extra_lines(prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    told = [row for row in prompts if "backward_extra_bytes" in row]
    names = dict.fromkeys(row["contender"] for row in told)
    lines: dict[Problem, dict[str, str]] = {}
    for row in told:
        problem = problem_of(row)
        line = lines.setdefault(
            problem,
            {
                "heads": f"{problem.query_heads}/{problem.kv_heads}",
                "S": f"{problem.context_tokens:,}",
                "batch": str(problem.batch),
                "dtype": problem.dtype,
                **dict.fromkeys(names, "-"),
            },
        )
        line[row["contender"]] = f"{row['backward_extra_bytes'] / MIB:,.0f}"
    return list(lines.values())
