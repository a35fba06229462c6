"""What stands in a compiled Triton kernel: registers, spills, shared memory, matrix instructions, widths of loads.

Read off the machine code with the tools of Triton's own wheel, and off the intermediate code (TTGIR) where it says what
a load is for. Both carry the source line that an instruction comes from, which ties them together; who called that line
is in the TTGIR only, as not every version of Triton hands it on.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BITS = {"i8": 8, "i16": 16, "bf16": 16, "f16": 16, "f32": 32}

Line = tuple[str, int]  # of a file
Place = tuple[Line, ...]  # a line, then where that was called from, and so on


@dataclasses.dataclass(frozen=True)
class Binary:
    """registers:       per thread
    stack_bytes:     per thread; what is spilled lies there
    spills:          instructions that read or write local memory
    shared_bytes:    per block, without what the system keeps
    matrix:          kinds of matrix instruction in the machine code, e.g. HGMMA (wgmma) or UTCHMMA (tcgen05)
    load_bits:       width of a load of K or V in bits -> how many such instructions; through registers or not
    buffered_bytes:  shared memory that loads of K and V are on their way to, per block
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    matrix: tuple[str, ...]
    load_bits: dict[int, int]
    buffered_bytes: int


def examine(compiled: Any, kinds: Sequence[str], block_keys: int) -> Binary:
    """What stands in a kernel that reads K and V as `kinds`, keys of BITS, in blocks of `block_keys` keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        code = _tool("nvdisasm", "--print-code", "--print-line-info", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    instructions = list(_instructions(code))
    wanted = _lines_of_loads(compiled.asm["ttgir"], kinds, block_keys)
    widths = collections.Counter(
        _width(name) for name, line in instructions if name.startswith("LDG") and "DEP" not in name and line in wanted
    )
    return Binary(
        registers=registers,
        stack_bytes=stack + local,
        spills=sum(name.startswith(("LDL", "STL")) for name, _ in instructions),
        shared_bytes=compiled.metadata.shared,
        matrix=tuple(sorted({name.split(".")[0] for name, _ in instructions if name.split(".")[0].endswith("MMA")})),
        load_bits=dict(sorted(widths.items())),
        buffered_bytes=_buffered_bytes(compiled.asm["ttgir"], kinds, block_keys),
    )


def _tool(name: str, *arguments: Any) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _instructions(code: str) -> Iterator[tuple[str, Line | None]]:
    """(name with suffixes, source line) of every instruction of nvdisasm's listing."""
    source = None
    for line in code.splitlines():
        if found := re.search(r'//## File "([^"]*)", line (\d+)', line):
            source = Path(found[1]).name, int(found[2])
        elif found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line):
            yield found[1], source


def _width(name: str) -> int:
    """Bits that a load instruction fetches per thread: LDG.E.128 or LDG.E.U16; 32 where it does not say."""
    widths = [int(part.lstrip("US")) for part in name.split(".")[1:] if re.fullmatch(r"[US]?(8|16|64|128|256)", part)]
    return widths[0] if widths else 32


def _lines_of_loads(ttgir: str, kinds: Sequence[str], block_keys: int) -> set[Line]:
    """Which lines load tiles of K or V: of their types, with as many keys as a block has on one side."""
    tile = rf"(?:tt\.load|async_copy_global_to_local) .*tensor<(\d+)x(\d+)x!tt\.ptr<(?:{'|'.join(kinds)})>"
    places = _named_places(ttgir)
    found = set()
    for line in ttgir.splitlines():
        loads = re.search(tile, line)
        if loads and block_keys in map(int, loads.groups()):
            found.update(_place(line[line.rindex("loc(") :], places)[:1])
    return found


def _named_places(ttgir: str) -> dict[str, str]:
    return dict(re.findall(r"^(#loc\w*) = (loc\(.*\))$", ttgir, re.MULTILINE))


def _place(text: str, places: dict[str, str]) -> Place:
    """The place of `loc(...)`, whose parts may be given by name."""
    if found := re.fullmatch(r'loc\("([^"]*)":(\d+):\d+\)', text):
        return ((Path(found[1]).name, int(found[2])),)
    if found := re.fullmatch(r"loc\(callsite\((#loc\w*) at (#loc\w*)\)\)", text):
        return _place(places[found[1]], places) + _place(places[found[2]], places)
    if found := re.fullmatch(r'loc\((?:"[^"]*"\()?(#loc\w*)\)?\)', text):
        return _place(places[found[1]], places)
    return ()


def _buffered_bytes(ttgir: str, kinds: Sequence[str], block_keys: int) -> int:
    """Loops one after another that load in the same place use the same memory in turn: the largest counts."""
    buffer = rf"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(\d+)x(\d+)x({'|'.join(kinds)}),.*(loc\(.*\))$"
    places = _named_places(ttgir)
    largest: dict[Place, int] = collections.defaultdict(int)
    for *shape, kind, place in re.findall(buffer, ttgir, re.MULTILINE):
        buffers, rows, columns = map(int, shape)
        if block_keys in (rows, columns):
            where = _place(place, places)
            largest[where] = max(largest[where], buffers * rows * columns * BITS[kind] // 8)
    return sum(largest.values())
