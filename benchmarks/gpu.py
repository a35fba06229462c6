"""Attention on this machine's GPU against torch's backends and every installed peer, and against what it could do.

    python benchmarks/gpu.py                 the most telling rows first, as many as nine minutes allow
    python benchmarks/gpu.py --tests         the same behind the tests of the Triton kernels on this GPU
    python benchmarks/gpu.py --append        go on with a run that was stopped, or with the rows not reached

Runs from a bare checkout, too: PYTHONPATH=src python3 benchmarks/gpu.py --tests

Every contender is checked against float64 before it is timed, and those that are wrong or cannot serve get no time.
Contenders take turns within a row, together with the probes of the GPU's limits, so that all ratios are of one run.
The rows are timed in a process of their own, begun again behind a row that ended it or made it hang. The record goes
to benchmarks/results/, a row at a time; tables are printed at the end. Ends with 1 if a test or a row failed the run,
with 2 where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_peers import LIBRARIES, contenders, peers
from gpu_rows import compiled, paged, rows
from gpu_tables import markdown
from peers import installed
from session import RESULTS, Run, name_of, parser, resume, slug, time_rows

from gqa.bench.commit import commit
from gqa.bench.device import choose_device
from gqa.bench.document import ABOUT_GPU_ATTENTION
from gqa.bench.gpu import measure_gpu
from gqa.bench.kernels import measure
from gqa.bench.problem import Problem
from gqa.errors import GqaError
from gqa.record import read_record

COMMAND = "benchmark gpu"
ROOT = Path(__file__).parents[1]
GPU_TESTS = ("tests/ops/test_triton*.py", "tests/bench/test_gpu.py")
TEST_PROCESSES = len(os.sched_getaffinity(0))  # where pytest can share its tests out: most time is the compiler's

# Seconds.
RESERVE = 25  # for the last row's end and the tables
GRACE = 15  # of it, until a row that has not come to its end is killed
STUCK = 120  # in one row: FlexAttention's compilation takes some tens
LEAST = 20  # worth beginning for
POLL = 0.5

MOST_STARTS = 8
WORKER = (sys.executable, __file__, "--worker")


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parser(__doc__)
    options.set_defaults(budget=0.25, impl="triton")
    options.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    options.add_argument("--tests", action="store_true", help="run the tests of the Triton kernels first")
    options.add_argument("--commit", help="which state of the sources this is, where git cannot tell")
    options.add_argument("--worker", metavar="JSON", help="time the rows in this process, as the command does itself")
    asked = vars(options.parse_args(arguments))
    try:
        choose_device("cuda")
    except GqaError as error:
        print(f"error: {error.what}: {error.got}", file=sys.stderr)
        return 2
    if worker := asked.pop("worker"):
        work(json.loads(worker))
        return 0
    deadline = began + 60 * asked["minutes"] - RESERVE
    path: Path = asked["out"] or RESULTS / f"{slug(torch.cuda.get_device_name())}-gpu.json"
    asked |= {"out": str(path), "commit": asked["commit"] or commit(), "deadline": deadline, "skip": []}
    green, asked["tests"] = run_tests(0.5 * (deadline - began)) if asked["tests"] else (True, "")
    ended = supervise(asked)
    if not path.exists():
        print("error: no row was timed", file=sys.stderr)
        return 1
    print(markdown(read_record(path, COMMAND)))
    print(f"wrote {path}", file=sys.stderr)
    return 0 if green and ended else 1


def run_tests(limit: float) -> tuple[bool, str]:
    """(whether all passed, pytest's closing line) of the tests that take a GPU where there is one. They are ended
    after `limit` seconds."""
    files = [str(file) for pattern in GPU_TESTS for file in sorted(ROOT.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    if installed("pytest-xdist"):
        command += ["-n", str(TEST_PROCESSES)]
    try:
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        said = f"not done after {limit:.0f} s"
        print(f"tests: {said}", file=sys.stderr)
        return False, said
    lines = run.stdout.strip().splitlines()
    print("\n".join(lines[-40:]), file=sys.stderr, flush=True)
    return run.returncode == 0, lines[-1] if lines else f"pytest ended with {run.returncode}"


def supervise(asked: dict[str, Any]) -> bool:
    """Time the rows in a process, and behind a row that ended it in another. Whether the last one came to its end."""
    current = row_file(Path(asked["out"]))
    try:
        for _ in range(MOST_STARTS):
            current.unlink(missing_ok=True)
            if time.monotonic() + LEAST > asked["deadline"]:
                return False
            process = subprocess.Popen([*WORKER, json.dumps(asked)])
            code = _watch(process, current, asked["deadline"] + GRACE)
            if code == 0:
                return True
            if not current.exists():  # no row is to blame
                return False
            asked["skip"] = [*asked["skip"], current.read_text()]
            asked["append"] = True
            print(f"the process ended with {code} in {asked['skip'][-1]}", file=sys.stderr, flush=True)
        return False
    finally:
        current.unlink(missing_ok=True)


def _watch(process: subprocess.Popen, current: Path, deadline: float) -> int:
    """Wait for the process, and kill it at the deadline or when it is stuck in a row. Its exit status."""
    try:
        while process.poll() is None:
            time.sleep(POLL)
            stuck = current.exists() and time.time() - current.stat().st_mtime > STUCK
            if stuck or time.monotonic() > deadline:
                break
    finally:
        process.kill()  # which does nothing to one that has ended
    return process.wait()


def row_file(record: Path) -> Path:
    """Where the name of the row stands that is being timed; it remains where the process ends in that row."""
    return record.with_suffix(".row")


def work(asked: Mapping[str, Any]) -> None:
    """Time the rows in this process."""
    path = Path(asked["out"])
    limits = measure_gpu()
    problems, large = rows(limits.machine.memory_bytes)
    problems = [problem for problem in problems if asked["only"] in name_of(problem)]
    found, absent = peers()
    inputs = {name: asked[name] for name in ("only", "impl", "repeats", "budget", "minutes", "commit")}
    run = Run(path, COMMAND, inputs, dataclasses.asdict(limits.machine), absent, ABOUT_GPU_ATTENTION)
    run.libraries = [*LIBRARIES.values()]
    if asked["append"]:
        resume(run)
    waiting = [name_of(problem) for problem in problems if not run.has(problem)]
    waiting = [name for name in waiting if name not in asked["skip"]]
    run.more = {
        "tests": asked["tests"],
        "crashed": asked["skip"],
        "not_reached": waiting,
        "too_large": [name_of(problem) for problem in large],
    }

    def measure_row(problem: Problem) -> list[dict[str, Any]]:
        current = row_file(path)
        current.parent.mkdir(parents=True, exist_ok=True)
        current.write_text(name_of(problem))
        torch.cuda.empty_cache()
        chosen = contenders(problem, found, asked["impl"], compiled=compiled(problem), paged=paged(problem))
        timed = measure(problem, chosen, limits, repeats=asked["repeats"], budget_seconds=asked["budget"])
        current.unlink()
        waiting.remove(name_of(problem))
        return timed

    chosen = [problem for problem in problems if name_of(problem) in waiting]
    time_rows(run, chosen, measure_row, asked["deadline"])
    run.write()


if __name__ == "__main__":
    sys.exit(main())
