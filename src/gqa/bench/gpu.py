"""A GPU's own limits, measured, and how calls are timed on it.

A timed run stands between two events of its stream. Before the first one the GPU is given something else to read, so
that Python has launched the run by the time its turn comes, and no time of Python's is counted. Decode is replayed
from a CUDA graph that makes several calls, as servers replay it: what remains is what the GPU itself needs for a call.
"""

# H KV heads · D head dim

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from gqa.bench.check import fp32_products
from gqa.bench.machine import Probe, fastest
from gqa.bench.problem import Problem
from gqa.bench.timing import Turn
from gqa.errors import GqaError
from gqa.hardware import Device, find_device
from gqa.units import GIB

BUFFER_BYTES = 2 * GIB
MATRIX_SIZES = {torch.bfloat16: (4096, 8192), torch.float16: (4096, 8192), torch.float32: (4096,)}
REPEATS = 9

GRAPH_BYTES, GRAPH_CALLS = GIB, 16


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """What the GPU is, and what it reached in this run.

    capability:  compute capability, such as 9.0
    cache_bytes: L2
    copy_bytes_per_second: of a copy within its memory, bytes read and bytes written
    read_bytes_per_second: of a reduction
    *_flops_per_second:    of torch.mm on normal numbers; fp32 by three tf32 products too, of about its precision
                           (medians of the fastest method, whose name stands beside)
    datasheet_bytes_per_second: what the vendor says, with its source; None for a GPU that gqa.hardware does not know
    """

    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    cache_bytes: int
    copy_bytes_per_second: float
    copy_method: str
    read_bytes_per_second: float
    read_method: str
    bf16_flops_per_second: float
    bf16_method: str
    fp16_flops_per_second: float
    fp16_method: str
    fp32_flops_per_second: float
    fp32_method: str
    datasheet_bytes_per_second: float | None
    datasheet_source: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class GpuLimits:
    """The GPU, and the probes that were fastest on it, to be run again between other measurements; `matrix` has one
    per dtype of queries."""

    machine: Gpu
    copy: Probe
    read: Probe
    matrix: Mapping[torch.dtype, Probe]
    device: ClassVar[str] = "cuda"

    def clock(self, run: Callable[[], object]) -> float:
        return event_clock(run, self.read.run)

    def probes(self, problem: Problem) -> dict[str, Probe]:
        """What to run in turns with the contenders of this problem."""
        return {"copy": self.copy, "read": self.read, "matrix": self.matrix[problem.query_dtype]}

    def rates(self, problem: Problem, rates: Mapping[str, float]) -> dict[str, float]:
        """Columns of the problem's rows, from the rates of `probes`. What takes X_seconds bounds a contender's time
        from below by the bound X: the memory's at decode, the matrix units' at prefill."""
        copy, read, matrix = rates["copy"], rates["read"], rates["matrix"]
        columns = {
            "copy_bytes_per_second": copy,
            "read_bytes_per_second": read,
            "matrix_flops_per_second": matrix,
            "limit_seconds": problem.roofline_seconds(max(copy, read), matrix),
        }
        if problem.causal:
            return columns | {"matrix_seconds": problem.flops / matrix}
        columns["copy_seconds"] = problem.kv_bytes / copy
        if self.machine.datasheet_bytes_per_second is not None:
            columns["datasheet_seconds"] = problem.kv_bytes / self.machine.datasheet_bytes_per_second
        return columns

    def rounds(self, problem: Problem) -> tuple[int, int]:
        """(rounds of warm-up, calls before the timed one of a turn)."""
        return 1, 0

    def turn(self, problem: Problem, runs: Sequence[Callable[[], Any]]) -> Turn:
        """A contender's turn: a graph of decode calls on one copy of K and V after the other, or one call of all else.
        `runs` must live as long as the turn."""
        if problem.causal or problem.backward:
            return Turn(lambda number: runs[number % len(runs)]())
        return captured(runs, calls_per_graph(problem.kv_bytes, len(runs)))

    def backward_bytes(self, forward: Callable[[], Any], backward: Callable[[Any], Any]) -> dict[str, int]:
        """What a backward pass allocates at its peak, over what was there when it began, and the same without the
        gradients that it returns."""
        out = forward()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = backward(out)
        peak = torch.cuda.max_memory_allocated() - before
        return {
            "backward_peak_bytes": peak,
            "backward_extra_bytes": peak - sum(gradient.nbytes for gradient in gradients),
        }


def event_clock(run: Callable[[], object], filler: Callable[[], object]) -> float:
    """Seconds that a run takes on the GPU, by two events around it, the first behind `filler`'s work.

    The filler should only read: what a write leaves in L2 would be written back in the run's time.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    filler()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # milliseconds


def captured(runs: Sequence[Callable[[], Any]], calls: int) -> Turn:
    """A turn that replays one CUDA graph of `calls` calls, which go round `runs`."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    found = None
    with torch.cuda.stream(side):
        for run in runs:  # what a first call on a stream sets up cannot be captured
            run()
        with torch.cuda.graph(graph, stream=side):
            for call in range(calls):
                found = runs[call % len(runs)]()
    torch.cuda.current_stream().wait_stream(side)
    return Turn(lambda _: graph.replay(), calls, lambda: found)


def calls_per_graph(kv_bytes: int, copies: int) -> int:
    """Whole rounds over the copies that read about GRAPH_BYTES, by at most GRAPH_CALLS calls or one round."""
    wanted = min(GRAPH_CALLS, math.ceil(GRAPH_BYTES / kv_bytes))
    return copies * max(1, wanted // copies)


def measure_gpu(*, repeats: int | None = None, device: str = "cuda") -> GpuLimits:
    """Measure the limits of torch's current CUDA device in turns: some seconds, and 4 GiB or an eighth of its memory.

    repeats: by default REPEATS; device: where the numbers lie. Raises GqaError for fewer than 1 repeat.
    """
    repeats = REPEATS if repeats is None else repeats
    about: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    count = min(BUFFER_BYTES, about.total_memory // 16)
    numbers, elsewhere = (torch.randn(count // 4, device=device) for _ in range(2))
    reads, copies = read_probes(numbers), copy_probes(numbers, elsewhere)
    clock = functools.partial(event_clock, filler=reads[0].run)
    read, read_rate = fastest(reads, repeats, clock)
    copy, copy_rate = fastest(copies, repeats, clock)
    matrices = {
        dtype: fastest(matrix_probes(dtype, sizes, device), repeats, clock) for dtype, sizes in MATRIX_SIZES.items()
    }
    known = datasheet(about.name)
    machine = Gpu(
        name=about.name,
        capability=f"{about.major}.{about.minor}",
        multiprocessors=about.multi_processor_count,
        memory_bytes=about.total_memory,
        cache_bytes=about.L2_cache_size,
        copy_bytes_per_second=copy_rate,
        copy_method=copy.name,
        read_bytes_per_second=read_rate,
        read_method=read.name,
        bf16_flops_per_second=matrices[torch.bfloat16][1],
        bf16_method=matrices[torch.bfloat16][0].name,
        fp16_flops_per_second=matrices[torch.float16][1],
        fp16_method=matrices[torch.float16][0].name,
        fp32_flops_per_second=matrices[torch.float32][1],
        fp32_method=matrices[torch.float32][0].name,
        datasheet_bytes_per_second=known and known.bandwidth_bytes_per_second,
        datasheet_source=known and known.sources["bandwidth"],
    )
    return GpuLimits(machine, copy, read, {dtype: probe for dtype, (probe, _) in matrices.items()})


def read_probes(numbers: torch.Tensor) -> list[Probe]:
    """Reductions that read fp32 numbers once and write next to nothing."""
    half, row = len(numbers) // 2, 4096
    left, right = numbers[:half], numbers[half : 2 * half]
    rows = numbers[: len(numbers) // row * row].view(-1, row)
    return [
        Probe("sum of fp32", numbers.nbytes, functools.partial(torch.sum, numbers)),
        Probe("max of fp32", numbers.nbytes, functools.partial(torch.max, numbers)),
        Probe("dot of fp32", left.nbytes + right.nbytes, functools.partial(torch.dot, left, right)),
        Probe(f"sums of {row} fp32", rows.nbytes, functools.partial(torch.sum, rows, 1)),
    ]


def copy_probes(numbers: torch.Tensor, elsewhere: torch.Tensor) -> list[Probe]:
    """The driver's own copy, and a kernel that reads and writes every number."""
    amount = numbers.nbytes + elsewhere.nbytes
    return [
        Probe("copy", amount, functools.partial(elsewhere.copy_, numbers)),
        Probe("negative of fp32", amount, functools.partial(torch.neg, numbers, out=elsewhere)),
    ]


def matrix_probes(dtype: torch.dtype, sizes: Iterable[int], device: str) -> list[Probe]:
    """Square products by torch.mm, 2 * size^3 FLOPs, of normal numbers: zeros and ones would cost less power, and so
    less time."""
    probes = []
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        name, flops = f"mm {size} x {size} x {size}", 2 * size**3
        probes += [
            Probe(name, flops, functools.partial(_multiply, left, right, out)),
            Probe(f"{name}, transposed", flops, functools.partial(_multiply, left, right.mT, out)),
        ]
        if dtype == torch.float32:
            run = functools.partial(_multiply, left, right, out, times=3, precision="high")
            probes.append(Probe(f"{name}, three times in tf32", flops, run))
    return probes


def _multiply(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, times: int = 1, precision: str = "highest"
) -> torch.Tensor:
    with fp32_products(precision):
        for _ in range(times):
            torch.mm(left, right, out=out)
    return out


def datasheet(name: str) -> Device | None:
    """The device of that name in gqa.hardware, if it is there."""
    try:
        return find_device(name)
    except GqaError:
        return None
