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

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import LIBRARIES, ours_in_bf16, peers
from rows import CONTEXTS, MODEL, MODEL_DTYPES, MODEL_LAYERS, full, headline
from session import RESULTS, Run, name_of, parser, resume, slug, time_rows
from tables import markdown

from gqa.bench.document import ABOUT_ATTENTION, ABOUT_GENERATION
from gqa.bench.generation import DEFAULT, generation_rows, random_model
from gqa.bench.kernels import OURS, measure, ours
from gqa.bench.machine import measure_limits
from gqa.bench.problem import TORCH_DTYPES, Problem
from gqa.config.shallow import shallow_config
from gqa.record import describe_machine
from gqa.source import open_source

COMMAND = "benchmark cpu"
STEPS = 16  # of a model: tenths of a second each


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


def result_path(folder: Path = RESULTS) -> Path:
    machine = describe_machine()
    return folder / f"{machine['cores']}-core-{slug(str(machine['processor']))}-cpu.json"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--rows", choices=("headline", "full"), default="headline")
    inputs = vars(options.parse_args(arguments))
    path = inputs.pop("out") or result_path()
    append = inputs.pop("append")

    limits = measure_limits()
    found, absent = peers()
    for name, reason in absent.items():
        print(f"{name} is absent: {reason}", file=sys.stderr)
    described = inputs | {"threads": torch.get_num_threads(), "model": MODEL, "layers": MODEL_LAYERS}
    libraries = [name for names in LIBRARIES.values() for name in names]
    machine = dataclasses.asdict(limits.machine)
    run = Run(path, COMMAND, described, machine, absent, ABOUT_ATTENTION + ABOUT_GENERATION, libraries)
    if append:
        resume(run)
    memory = describe_machine()["memory_bytes"] or 8 << 30
    problems = headline() if inputs["rows"] == "headline" else full(memory)
    problems = [problem for problem in problems if inputs["only"] in name_of(problem)]
    contenders = {OURS: ours(inputs["impl"]), **found}

    def measure_row(problem: Problem) -> list[dict[str, Any]]:
        more = {"gqa in bf16": ours_in_bf16} if problem.dtype == "int8" else {}
        return measure(problem, contenders | more, limits, repeats=inputs["repeats"], budget_seconds=inputs["budget"])

    time_rows(run, problems, measure_row)
    if "generation".startswith(inputs["only"]):
        time_generation(run, CONTEXTS, MODEL_DTYPES, MODEL_LAYERS, min(inputs["repeats"], STEPS))
    print(markdown(run.write()))
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
