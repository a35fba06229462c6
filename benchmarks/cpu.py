"""Attention on this machine's CPU against every installed peer, and against what the machine could do.

    python benchmarks/cpu.py                 the rows behind the claims, some eight minutes on 2 cores
    python benchmarks/cpu.py --rows full     every shape, hours
    python benchmarks/cpu.py --append        go on with a run that was stopped, or add rows to it

Every contender is checked against float64 before it is timed, and those that are wrong or cannot serve get no time.
Contenders take turns within a row, together with the probes of the machine's limits, so that all ratios are of one
run. The record goes to benchmarks/results/, a row at a time; a table for the README is printed at the end.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import LIBRARIES, ours_in_bf16, peers
from rows import CONTEXTS, MODEL, MODEL_DTYPES, MODEL_LAYERS, full, headline
from tables import markdown

from gqa.bench.generation import DEFAULT, generation_rows, random_model
from gqa.bench.kernels import OURS, Contender, describe, measure, ours
from gqa.bench.machine import Limits, measure_limits
from gqa.bench.problem import TORCH_DTYPES, Problem
from gqa.bench.run import ABOUT_ATTENTION, ABOUT_GENERATION, record
from gqa.config.shallow import shallow_config
from gqa.record import Record, describe_machine, read_record
from gqa.source import open_source

COMMAND = "benchmark cpu"
STEPS = 16  # of a model: tenths of a second each
RESULTS = Path(__file__).with_name("results")


@dataclasses.dataclass
class Run:
    """The rows so far, written to `path` after each addition. Rows of the same kind replace earlier ones."""

    path: Path
    inputs: dict[str, Any]
    machine: Mapping[str, Any]
    absent: Mapping[str, str]
    attention: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    generation: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def has(self, problem: Problem) -> bool:
        return any(_same(row, describe(problem)) for row in self.attention)

    def has_generation(self, dtype: str, context: int) -> bool:
        name = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
        return any((row["dtype"], row["context_tokens"]) == (name, context) for row in self.generation)

    def write(self) -> Record:
        results = {
            "machine": self.machine,
            "absent": self.absent,
            "attention": self.attention,
            "generation": self.generation,
        }
        libraries = [name for names in LIBRARIES.values() for name in names]
        document = record(COMMAND, self.inputs, results, ABOUT_ATTENTION + ABOUT_GENERATION, libraries)
        document.write(self.path)
        return document


def _same(row: Mapping[str, Any], problem: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in problem.items())


def resume(run: Run) -> None:
    """Take over the rows of an earlier run of the same commit."""
    if not run.path.exists():
        return
    earlier = read_record(run.path, COMMAND)
    fresh = record(COMMAND, {}, {}, ())
    if earlier.inputs["commit"] != fresh.inputs["commit"]:
        sys.exit(
            f"error: {run.path.name} is of commit {earlier.inputs['commit']}\nhint: leave out --append to begin anew"
        )
    run.attention = list(earlier.results["attention"])
    run.generation = list(earlier.results["generation"])


def time_attention(
    run: Run,
    problems: Sequence[Problem],
    contenders: Mapping[str, Contender],
    limits: Limits,
    repeats: int,
    budget_seconds: float,
) -> None:
    for done, problem in enumerate(problems, start=1):
        if run.has(problem):
            continue
        found = dict(contenders)
        if problem.dtype == "int8":
            found["gqa in bf16"] = ours_in_bf16
        rows = measure(problem, found, limits, repeats=repeats, budget_seconds=budget_seconds)
        run.attention += rows
        run.write()
        print(f"{done}/{len(problems)} {_line(problem, rows)}", file=sys.stderr, flush=True)


def time_generation(run: Run, contexts: Sequence[int], dtypes: Sequence[str], layers: int, repeats: int) -> None:
    source = open_source(run.inputs["model"])
    for dtype in dtypes:
        missing = [context for context in contexts if not run.has_generation(dtype, context)]
        if not missing:
            continue
        model = random_model(shallow_config(source.config, layers, source.name), TORCH_DTYPES[dtype])
        for row in generation_rows(model, missing, repeats=repeats):
            run.generation.append(row)
            if row["contender"] == DEFAULT:  # the second of a context's two rows
                run.write()
            rate = row.get("tokens_per_second")
            took = row["status"] if rate is None else f"{rate:.3g} tokens per second"
            print(f"{dtype} {row['context_tokens']} {row['contender']}: {took}", file=sys.stderr, flush=True)


def name_of(problem: Problem) -> str:
    kind = "backward" if problem.backward else "prefill" if problem.causal else "decode"
    return (
        f"{kind} {problem.query_heads}/{problem.kv_heads} D {problem.head_dim} S {problem.context_tokens}"
        f" batch {problem.batch} {problem.dtype}"
    )


def _line(problem: Problem, rows: Sequence[Mapping[str, Any]]) -> str:
    """A row as progress: the shape, our time and share of the limit, and the best other."""
    mine = next(row for row in rows if row["contender"] == OURS)
    if mine["status"] != "timed":
        return f"{name_of(problem)}: {mine['status']}, {mine['reason']}"
    others = [row for row in rows if row["status"] == "timed" and row["contender"] != OURS]
    best = min(others, key=lambda row: row["seconds_p50"], default=None)
    beside = f", {best['contender']} {best['times_of_gqa']:.2f}x" if best else ""
    took = f"{mine['seconds_p50'] * 1e3:.3g} ms, {mine['fraction_of_roofline']:.0%} of the roofline"
    return f"{name_of(problem)}: {took}{beside}"


def result_path(folder: Path = RESULTS) -> Path:
    machine = describe_machine()
    slug = re.sub(r"[^a-z0-9]+", "-", str(machine["processor"]).lower()).strip("-")
    return folder / f"{machine['cores']}-core-{slug}-cpu.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", choices=("headline", "full"), default="headline")
    parser.add_argument("--only", default="", help="rows whose name, such as 'decode 64/8 D 128', contains this")
    parser.add_argument("--append", action="store_true", help="go on with the record that is there")
    parser.add_argument("--impl", default="auto", help="the implementation under test, as in gqa.attention")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per contender and row")
    parser.add_argument("--out", type=Path, help="the record's path")
    inputs = vars(parser.parse_args(arguments))
    path = inputs.pop("out") or result_path()
    append = inputs.pop("append")

    limits = measure_limits()
    found, absent = peers()
    for name, reason in absent.items():
        print(f"{name} is absent: {reason}", file=sys.stderr)
    described = inputs | {"threads": torch.get_num_threads(), "model": MODEL, "layers": MODEL_LAYERS}
    run = Run(path, described, dataclasses.asdict(limits.machine), absent)
    if append:
        resume(run)
    memory = describe_machine()["memory_bytes"] or 8 << 30
    problems = headline() if inputs["rows"] == "headline" else full(memory)
    problems = [problem for problem in problems if inputs["only"] in name_of(problem)]
    contenders = {OURS: ours(inputs["impl"]), **found}
    time_attention(run, problems, contenders, limits, inputs["repeats"], inputs["budget"])
    if "generation".startswith(inputs["only"]):
        time_generation(run, CONTEXTS, MODEL_DTYPES, MODEL_LAYERS, min(inputs["repeats"], STEPS))
    print(markdown(run.write()))
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
