"""torch.cuda's events, streams and graphs on a machine without a GPU: work is done at once on the CPU, and the time of
the GPU goes on only when the work says so."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gqa.bench import kernels
from gqa.bench.gpu import Gpu, GpuLimits
from gqa.bench.machine import Probe
from gqa.bench.problem import random_inputs


class FakeCuda:
    """now: seconds of the GPU; log: what was done in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.graph: Any = None  # that is being captured
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now
                outer.log.append("event")

            def synchronize(self) -> None:
                outer.log.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.seconds: list[float] = []

            def replay(self) -> None:
                assert outer.graph is None
                outer.now += sum(self.seconds)
                outer.log.append("replay")

        @contextlib.contextmanager
        def graph(graph: Graph, stream: Any) -> Any:
            outer.graph = graph
            yield
            outer.graph = None

        stream = SimpleNamespace(wait_stream=lambda _: None)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "Stream", lambda: stream)
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: self.log.append("reset"))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 501_000)
        patch.setattr(kernels, "random_inputs", lambda problem, seed, device: random_inputs(problem, seed))

    def work(self, seconds: float, name: str = "work") -> None:
        """Takes this long on the GPU; where a graph is being captured, when it is replayed."""
        if self.graph is not None:
            self.graph.seconds.append(seconds)
        else:
            self.now += seconds
            self.log.append(name)

    def contender(self, inner: kernels.Contender, seconds: float) -> kernels.Contender:
        """One that computes the same and takes this long."""

        def contender(inputs: Any) -> kernels.Ready:
            ready = inner(inputs)

            def run() -> Any:
                self.work(seconds)
                return ready.run()

            return kernels.Ready(run, ready.read, ready.note, ready.halves)

        return contender


def gpu_limits(cuda: FakeCuda, *, cache_bytes: int = 1 << 14) -> GpuLimits:
    """Of an H200 whose probes say 4 TB/s of copy, 3 TB/s of read and 500 TFLOP/s."""
    machine = Gpu(
        name="NVIDIA H200",
        capability="9.0",
        multiprocessors=132,
        memory_bytes=141 * 10**9,
        cache_bytes=cache_bytes,
        copy_bytes_per_second=4e12,
        copy_method="copy",
        read_bytes_per_second=3e12,
        read_method="sum",
        bf16_flops_per_second=5e14,
        bf16_method="mm",
        fp16_flops_per_second=5e14,
        fp16_method="mm",
        fp32_flops_per_second=5e13,
        fp32_method="mm",
        datasheet_bytes_per_second=4.8e12,
        datasheet_source="a sheet",
    )
    matrix = Probe("mm", 5 * 10**11, lambda: cuda.work(1e-3, "mm"))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return GpuLimits(
        machine,
        Probe("copy", 4 * 10**9, lambda: cuda.work(1e-3, "copy")),
        Probe("sum", 3 * 10**9, lambda: cuda.work(1e-3, "sum")),
        dict.fromkeys(dtypes, matrix),
    )
