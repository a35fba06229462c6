"""Tile shapes of the Triton kernels, from a table: nothing is tuned at a user's first call.

triton_tiles.json holds one row per kernel, compute capability, head dim and kind of element. Rows are written by hand
or by benchmarks/triton_tune.py on the GPU at hand, and every one of them is compiled and checked by
benchmarks/triton_compile.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json

import torch

KERNELS = ("forward", "decode", "backward_keys", "backward_rows")
CAPABILITIES = (80, 89, 90, 100)
HEAD_DIMS = (64, 128, 256)
DECODE_ROWS = (16, 32, 64)  # 16 is the least that a matrix instruction takes


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program works on, and with what.

    block_rows: packed rows, (token, query of the group) pairs of one KV head; in "backward_keys" tokens of a query head
    block_keys: keys in one step
    warps:      warps per program
    stages:     steps whose loads are in flight, as Triton counts them
    """

    block_rows: int
    block_keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where a tile stands in the table.

    capability: one of CAPABILITIES; head_dim: one of HEAD_DIMS, at least the wider of D and Dv;
    kind:       bits of an element, "16" or "32"; "8" for int8 K and V in decode
    """

    kernel: str
    capability: int
    head_dim: int
    kind: str


@functools.cache
def tile(
    kernel: str,
    capability: int,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    rows: int,
    masked: bool = False,
) -> Tile:
    """The tile of a kernel (one of KERNELS) for q of `dtype` and k and v of `kv_dtype`.

    capability: of the device, 10 * major + minor; at least 80
    head_dim, v_head_dim: D and Dv, at most 256
    rows: packed rows of a KV head, T * G; only "decode" looks at them: of DECODE_ROWS its tile has the least that holds
          them, and no more than its row of the table says
    masked: whether there is a mask; its numbers take registers, so that half as much is streamed at a time, but in
          "decode", whose scores are few
    """
    found = table()[place(kernel, capability, head_dim, v_head_dim, dtype, kv_dtype)]
    if masked and kernel in ("forward", "backward_rows"):
        return dataclasses.replace(found, block_keys=max(16, found.block_keys // 2))
    if masked and kernel == "backward_keys":
        return dataclasses.replace(found, block_rows=max(16, found.block_rows // 2))
    if kernel != "decode":
        return found
    block_rows = min(next((most for most in DECODE_ROWS if rows <= most), found.block_rows), found.block_rows)
    block_keys = found.block_keys
    if kv_dtype == torch.int8 and (block_rows > DECODE_ROWS[0] or dtype == torch.float32):
        block_keys = min(block_keys, 64)  # with more of them, registers do not suffice
    return dataclasses.replace(found, block_rows=block_rows, block_keys=block_keys)


def place(
    kernel: str, capability: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> Place:
    """The row of the table that serves these tensors on this device."""
    assert kernel in KERNELS, kernel
    width = next(most for most in HEAD_DIMS if max(head_dim, v_head_dim) <= most)
    kind = "8" if kernel == "decode" and kv_dtype == torch.int8 else "32" if dtype == torch.float32 else "16"
    return Place(kernel, nearest(capability), width, kind)


def nearest(capability: int) -> int:
    """The capability of the table whose limits a device of this capability has.

    Shared memory of a block, which decides, is 163 KiB on 8.0 and 8.7, 227 KiB on 9.x to 11.x, and 99 KiB on 8.6, 8.9
    and 12.x (CUDA C++ Programming Guide, technical specifications per compute capability).
    """
    assert capability >= 80, capability
    if capability in (80, 87):
        return 80
    if capability < 90 or capability >= 120:
        return 89
    return 90 if capability < 100 else 100


@functools.cache
def table() -> dict[Place, Tile]:
    """Every row of triton_tiles.json."""
    text = importlib.resources.files("gqa.ops").joinpath("triton_tiles.json").read_text("utf-8")
    names = [field.name for field in dataclasses.fields(Place)]
    return {
        Place(*(row[name] for name in names)): Tile(**{key: row[key] for key in row if key not in names})
        for row in json.loads(text)["rows"]
    }
