"""A run of a benchmark: its rows so far, and their record, written a row at a time so that a stop loses nothing."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa.bench.document import record
from gqa.bench.kernels import OURS, describe
from gqa.bench.problem import TORCH_DTYPES, Problem
from gqa.record import Record, read_record

RESULTS = Path(__file__).with_name("results")
WORK = Path("build")  # where models lie meanwhile; git does not see it
RECENT_ROWS = 8


@dataclasses.dataclass
class Run:
    """What is in the record, which lies at `path`.

    about:     what the reader should know, for the kinds of rows there are
    libraries: whose versions are told beside the usual ones
    more:      further results
    """

    path: Path
    command: str
    inputs: dict[str, Any]
    machine: Mapping[str, Any]
    absent: Mapping[str, str]
    about: Sequence[str] = ()
    libraries: Sequence[str] = ()
    attention: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    generation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

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
            **self.more,
        }
        document = record(self.command, self.inputs, results, self.about, self.libraries)
        document.write(self.path)
        return document


def _same(row: Mapping[str, Any], problem: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in problem.items())


def resume(run: Run) -> None:
    """Take over the rows of an earlier run of the same commit."""
    if not run.path.exists():
        return
    earlier = read_record(run.path, run.command)
    fresh = record(run.command, run.inputs, {}, ())
    if earlier.inputs["commit"] != fresh.inputs["commit"]:
        sys.exit(
            f"error: {run.path.name} is of commit {earlier.inputs['commit']}\nhint: leave out --append to begin anew"
        )
    run.attention = list(earlier.results["attention"])
    run.generation = list(earlier.results["generation"])


def time_rows(
    run: Run,
    problems: Sequence[Problem],
    measure_row: Callable[[Problem], list[dict[str, Any]]],
    deadline: float = math.inf,
) -> None:
    """Measure what the run does not have yet, in order, as long as another row that takes what the longest of the last
    few took would end before `deadline`, in time.monotonic's seconds."""
    recent = collections.deque([0.0], maxlen=RECENT_ROWS)
    for done, problem in enumerate(problems, start=1):
        if run.has(problem):
            continue
        began = time.monotonic()
        if began + max(recent) > deadline:
            return
        rows = measure_row(problem)
        run.attention += rows
        run.write()
        recent.append(time.monotonic() - began)
        print(f"{done}/{len(problems)} {_line(problem, rows)}", file=sys.stderr, flush=True)


def name_of(problem: Problem) -> str:
    kind = "backward" if problem.backward else "prefill" if problem.causal else "decode"
    return (
        f"{kind} {problem.query_heads}/{problem.kv_heads} D {problem.head_dim} S {problem.context_tokens}"
        f" batch {problem.batch} {problem.dtype}"
    )


def _line(problem: Problem, rows: Sequence[Mapping[str, Any]]) -> str:
    """A row as progress: the shape, our time and share of what there is, and the best other."""
    mine = next(row for row in rows if row["contender"] == OURS)
    if mine["status"] != "timed":
        return f"{name_of(problem)}: {mine['status']}, {mine['reason']}"
    others = [row for row in rows if row["status"] == "timed" and row["contender"] != OURS]
    best = min(others, key=lambda row: row["seconds_p50"], default=None)
    beside = f", {best['contender']} {best['times_of_gqa']:.2f}x" if best else ""
    bound = "limit" if mine["device"] == "cuda" else "roofline"
    took = f"{mine['seconds_p50'] * 1e3:.3g} ms, {mine[f'fraction_of_{bound}']:.0%} of the {bound}"
    return f"{name_of(problem)}: {took}{beside}"


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark of attention has."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--only", default="", help="rows whose name, such as 'decode 64/8 D 128', contains this")
    options.add_argument("--append", action="store_true", help="go on with the record that is there")
    options.add_argument(
        "--impl", default="auto", help="the implementation under test, as in gqa.attention  [%(default)s]"
    )
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--budget", type=float, default=1.0, help="seconds per contender and row")
    options.add_argument("--out", type=Path, help="the record's path")
    return options
