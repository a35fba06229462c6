"""Kernels become C functions of one pointer here: compiled for this machine at first use, then read from disk."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc, types

from gqa.ops import simd

KERNELS = ("cpu_backward", "cpu_forward", "job", "rows", "simd", "tiles")  # a test holds that they import no others
_NOTE_AFTER_SECONDS = 2.0
_SIGNATURE = types.void(types.voidptr)


@cache
def _build() -> str:
    """What compiled code depends on beside the types it is compiled for: our sources and the choice of vectors.

    Numba's cache on disk looks only at the file of the function itself, so an older kernel would be served.
    """
    text = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in KERNELS)
    return f"{hashlib.sha256(text).hexdigest()[:16]} {simd.WIDTH} {simd.REGISTERS}"


def address(entry: Callable[..., Any], *kinds: simd.Kind) -> int:
    """The address of a kernel for these kinds of numbers: a C function of one pointer.

    entry(build, *kinds) makes the Python function. It has to be a closure over all of them: they are part of its key
    in the cache on disk. After two seconds a note on stderr says what takes so long.
    """
    return worker(entry, *kinds).address


@cache
def worker(entry: Callable[..., Any], *kinds: simd.Kind) -> Any:
    """The compiled function itself, whose IR can be inspected."""
    note = threading.Timer(_NOTE_AFTER_SECONDS, _say, [entry.__module__.rpartition(".")[2]])
    note.daemon = True
    note.start()
    function = entry(_build(), *kinds)
    try:
        return cfunc(_SIGNATURE, cache=True)(function)
    except RuntimeError as error:  # there is no folder to cache in, and Numba has no class of its own for that
        if "cannot cache" not in str(error):
            raise
        return cfunc(_SIGNATURE)(function)
    finally:
        note.cancel()


def _say(name: str) -> None:
    print(f"gqa: compiling {name} for this machine, once (it is kept on disk)", file=sys.stderr)
