"""This machine's own limits, measured: how fast it reads memory and how fast it multiplies fp32 matrices.

A share of a limit is only honest if nothing can go faster, so each limit is the fastest of several ways to reach it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from gqa.bench.problem import Problem
from gqa.bench.timing import Clock, Turn, host_clock, take_turns
from gqa.record import describe_machine
from gqa.units import MIB

READ_BYTES = 256 * MIB
MATRIX_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 1024))
REPEATS = 9
UNKNOWN_CACHE_BYTES = 64 * MIB

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What the machine is, and what it reached in this run with `threads` threads.

    simd:                 the vector instructions torch found, such as AVX2 or AVX512
    cache_bytes:          the last-level cache
    read_bytes_per_second, fp32_flops_per_second: medians of the fastest method, whose name stands beside
    sgemm_flops_per_second: the fastest torch.mm. Its library need not use all that the processor has, so it may lie
                          well below fp32_flops_per_second
    """

    processor: str
    cores: int
    threads: int
    simd: str
    cache_bytes: int
    read_bytes_per_second: float
    read_method: str
    fp32_flops_per_second: float
    matrix_method: str
    sgemm_flops_per_second: float
    sgemm_method: str


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """A piece of work whose `amount`, in bytes or FLOPs, over its time is a rate of the machine."""

    name: str
    amount: int
    run: Callable[[], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The machine, and the probes that were fastest on it, to be run again between other measurements."""

    machine: Machine
    read: Probe
    multiply: Probe
    sgemm: Probe
    device: ClassVar[str] = "cpu"

    @staticmethod
    def clock(run: Callable[[], object]) -> float:
        return host_clock(run)

    def probes(self, problem: Problem) -> dict[str, Probe]:
        """What to run in turns with the contenders of any problem."""
        return {"read": self.read, "sgemm": self.sgemm, "multiply": self.multiply}

    def rates(self, problem: Problem, rates: Mapping[str, float]) -> dict[str, float]:
        """Columns of the problem's rows, from the rates of `probes`. What takes X_seconds bounds a contender's time
        from below by the bound X."""
        read, sgemm, multiply = rates["read"], rates["sgemm"], rates["multiply"]
        return {
            "read_bytes_per_second": read,
            "sgemm_flops_per_second": sgemm,
            "fp32_flops_per_second": multiply,
            "roofline_seconds": problem.roofline_seconds(read, sgemm),
            "limit_seconds": problem.roofline_seconds(read, max(sgemm, multiply)),
        }

    def rounds(self, problem: Problem) -> tuple[int, int]:
        """(rounds of warm-up, calls before the timed one of a turn). The check has been a first run for all; a prefill
        is too long for more of them."""
        return (0, 0) if problem.causal else (2, 1)

    def turn(self, problem: Problem, runs: Sequence[Callable[[], Any]]) -> Turn:
        """A contender's turn: the call on the next of the copies of K and V."""
        return Turn(lambda number: runs[number % len(runs)]())

    def backward_bytes(self, forward: Callable[[], Any], backward: Callable[[Any], Any]) -> dict[str, int]:
        """What a backward pass allocates is not told by a CPU's allocator."""
        return {}


def measure_machine() -> Machine:
    """Measure the limits with torch's threads; a second or two, and a buffer of 4 last-level caches or 256 MiB."""
    return measure_limits().machine


def measure_limits(
    *,
    read_bytes: int | None = None,
    matrix_shapes: tuple[tuple[int, int, int], ...] | None = None,
    repeats: int | None = None,
) -> Limits:
    """Time every probe in turns and keep the fastest of each kind.

    read_bytes: the size of the buffer that is read; by default far more than the last-level cache holds.
    matrix_shapes: (rows, inner, columns) of the products, by default MATRIX_SHAPES; repeats: by default REPEATS.
    Raises GqaError for fewer than 1 repeat.
    """
    matrix_shapes = MATRIX_SHAPES if matrix_shapes is None else matrix_shapes
    repeats = REPEATS if repeats is None else repeats
    cache = last_level_cache_bytes()
    reads = read_probes(read_bytes or max(READ_BYTES, 4 * cache))
    kinds = (reads, sgemm_probes(matrix_shapes), onednn_probes(matrix_shapes))
    (read, read_rate), *matrices = (fastest(kind, repeats) for kind in kinds if kind)
    sgemm, sgemm_rate = matrices[0]
    multiply, matrix_rate = max(matrices, key=lambda found: found[1])
    about = describe_machine()
    machine = Machine(
        processor=about["processor"],
        cores=about["cores"],
        threads=torch.get_num_threads(),
        simd=torch.backends.cpu.get_cpu_capability(),
        cache_bytes=cache,
        read_bytes_per_second=read_rate,
        read_method=read.name,
        fp32_flops_per_second=matrix_rate,
        matrix_method=multiply.name,
        sgemm_flops_per_second=sgemm_rate,
        sgemm_method=sgemm.name,
    )
    return Limits(machine, read, multiply, sgemm)


def fastest(probes: list[Probe], repeats: int, clock: Clock = host_clock) -> tuple[Probe, float]:
    """The probe of the highest rate, and that rate, amount over median seconds."""
    turns = {probe.name: lambda _, probe=probe: probe.run() for probe in probes}
    timed = take_turns(turns, repeats=repeats, clock=clock)
    rates = {probe.name: probe.amount / timed[probe.name].p50 for probe in probes}
    best = max(probes, key=lambda probe: rates[probe.name])
    return best, rates[best.name]


def read_probes(count: int) -> list[Probe]:
    """Reductions that read `count` bytes once and write next to nothing. Which of them torch runs in long vectors on
    all threads differs between machines."""
    numbers = torch.ones(count // 4)
    count = numbers.nbytes
    left, right = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 : len(numbers) // 2 * 2]
    integers = numbers[: len(numbers) // 2 * 2].view(torch.int64)
    return [
        Probe("sum of fp32", count, functools.partial(torch.sum, numbers)),
        Probe("max of fp32", count, functools.partial(torch.max, numbers)),
        Probe("dot of fp32", left.nbytes + right.nbytes, functools.partial(torch.dot, left, right)),
        Probe("sum of int64", integers.nbytes, functools.partial(torch.sum, integers)),
    ]


def sgemm_probes(shapes: Iterable[tuple[int, int, int]]) -> list[Probe]:
    """fp32 (rows, inner) @ (inner, columns) by torch.mm, 2 * rows * inner * columns FLOPs."""
    probes = []
    for rows, inner, columns in shapes:
        left, right, out = torch.ones(rows, inner), torch.ones(inner, columns), torch.empty(rows, columns)
        run = functools.partial(torch.mm, left, right, out=out)
        probes.append(Probe(f"sgemm {rows} x {inner} x {columns}", 2 * rows * inner * columns, run))
    return probes


def onednn_probes(shapes: Iterable[tuple[int, int, int]]) -> list[Probe]:
    """The same products by oneDNN with the weights laid out its way, where torch has it: it compiles for the
    processor at hand, whoever made it."""
    if not torch.backends.mkldnn.is_available():
        return []
    probes = []
    for rows, inner, columns in shapes:
        left, right = torch.ones(rows, inner).to_mkldnn(), torch.ones(columns, inner).to_mkldnn()
        run = functools.partial(torch.nn.functional.linear, left, right)
        probes.append(Probe(f"oneDNN {rows} x {inner} x {columns}", 2 * rows * inner * columns, run))
    return probes


def last_level_cache_bytes(caches: Path = _CACHES) -> int:
    """The largest cache that Linux tells of; 64 MiB where it tells of none, which errs on the side of cold caches."""
    sizes = []
    for path in caches.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]])
    return max(sizes, default=0) or UNKNOWN_CACHE_BYTES
