"""A ctypes structure as compiled kernels see it: `job.name` reads a field from memory.

One address carries a whole call to its workers, which costs Python a few microseconds whatever the number of fields.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, models, register_model

from gqa.ops.simd import intrinsic

_FIELDS = {ctypes.c_int64: (types.int64, ir.IntType(64)), ctypes.c_double: (types.float64, ir.DoubleType())}


class JobType(types.Type):
    """The type of structures of int64 and float64 fields; `view` makes one of an address."""

    def __init__(self, structure: type[ctypes.Structure]) -> None:
        super().__init__(name=f"Job({structure.__module__}.{structure.__qualname__})")
        self.fields = {
            name: (getattr(structure, name).offset, *_FIELDS[kind])
            for name, kind in structure._fields_  # type: ignore[misc]
        }


@register_model(JobType)
class _JobModel(models.PrimitiveModel):
    def __init__(self, manager: Any, job: JobType) -> None:
        super().__init__(manager, job, ir.IntType(64))


@infer_getattr
class _Fields(AttributeTemplate):
    key = JobType

    def generic_resolve(self, job: JobType, name: str) -> Any:
        return job.fields[name][1] if name in job.fields else None


@lower_getattr_generic(JobType)
def _read(context: Any, builder: Any, job: JobType, address: Any, name: str) -> Any:
    offset, _, element = job.fields[name]
    place = builder.add(address, ir.IntType(64)(offset))
    value = builder.load(builder.inttoptr(place, element.as_pointer()))
    # A job does not change while it runs, so a loop that stores to memory need not read its fields anew.
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def viewer(structure: type[ctypes.Structure]) -> Any:
    """A word for kernels: `view(address)` is the structure at an address."""
    job = JobType(structure)

    @intrinsic
    def view(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.ptrtoint(arguments[0], ir.IntType(64))

        return job(types.voidptr), code

    return view


def fields(integers: str, doubles: str) -> tuple[tuple[str, Any], ...]:
    """The `_fields_` of a structure from the names of its int64 and float64 fields."""
    return (
        *((name, ctypes.c_int64) for name in integers.split()),
        *((name, ctypes.c_double) for name in doubles.split()),
    )


def places(sizes: dict[str, int]) -> dict[str, int]:
    """Where each part of a worker's scratch begins, on a cache line each, in bytes; and SCRATCH_BYTES for all."""
    result, end = {}, 0
    for name, size in sizes.items():
        result[name] = end
        end += -(-size // 64) * 64
    return {**result, "SCRATCH_BYTES": end}
