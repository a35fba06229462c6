"""Run a compiled worker on several threads: those that torch already has.

torch's own OpenMP runtime is asked, so attention and torch's other operators share one pool of threads, of one size,
and never wait for each other spinning. Where torch brings another runtime, or in a child after a fork (its threads
stayed with the parent), plain Python threads do it: the workers hold no lock of the interpreter.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Any:
    """GOMP_parallel of the runtime that torch loaded; GNU's, LLVM's and Intel's all have it. None without one."""
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and line.count("/")}
    except OSError:
        files = set()
    for file in sorted(files, key=lambda file: "torch" not in file):
        if not os.path.basename(file).startswith(("libgomp", "libomp", "libiomp5")):
            continue
        try:
            start = ctypes.CDLL(file).GOMP_parallel
        except (OSError, AttributeError):
            continue
        start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        start.restype = None
        return start
    return None


_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked, _pool, _lock
    _forked, _pool, _lock = True, None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def count() -> int:
    """Threads for one call: as many as torch takes for its own operators."""
    return torch.get_num_threads()


def run(worker: int, argument: int, threads: int) -> None:
    """Call worker(argument) on `threads` threads at once, this one included; return when all are done.

    worker: the address of a C function of one pointer that shares the work out itself; it must not raise.
    """
    if threads == 1:
        _WORKER(worker)(argument)
    elif not _forked and (start := _openmp()) is not None:
        start(worker, argument, threads, 0)
    else:
        _run_on_python_threads(_WORKER(worker), argument, threads)


def _run_on_python_threads(worker: Any, argument: int, threads: int) -> None:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(threads, os.cpu_count() or 1) - 1 or 1, thread_name_prefix="gqa")
        others = [_pool.submit(worker, argument) for _ in range(threads - 1)]
    worker(argument)
    for other in others:
        other.result()
