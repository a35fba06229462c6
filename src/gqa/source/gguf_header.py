"""The header of a GGUF file, checked against the file before any library reads it.

A file is `"GGUF" | version u32 | tensors u64 | keys u64 | metadata | table of tensors | padding | data`, all of it
little-endian; a text is `length u64 | UTF-8`. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gqa.errors import GqaError
from gqa.source.files import check_file

# Type in the table -> (name, elements per block, bytes per block), of those that the gguf package can dequantise.
# Source: GGML_QUANT_SIZES of that package; a test compares the two.
BLOCKS = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98)},
    **{19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82)},
    **{23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17)},
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _UINT32 = 8, 9, 4
_ALIGNMENTS = [1 << power for power in range(3, 21)]

# Far above any real file; below what would take long to read, or much memory to hold.
_MAX_KEYS, _MAX_TENSORS, _MAX_ELEMENTS, _MAX_NAME, _MAX_TEXT = 10_000, 200_000, 10_000_000, 1000, 100_000
_SMALLEST_KEY, _SMALLEST_TENSOR = 13, 32  # bytes


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """metadata: scalars and texts by key (texts above 100,000 bytes are left out); lengths: of arrays, by key;
    shapes: of tensors, outermost dimension first; types: of tensors, as BLOCKS names them; starts: where in the file
    each begins."""

    path: Path
    metadata: Mapping[str, int | float | bool | str]
    lengths: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    starts: Mapping[str, int]

    def floats(self, name: str) -> list[float]:
        """The numbers of a small tensor of type F32."""
        count = math.prod(self.shapes[name])
        with self.path.open("rb") as stream:
            stream.seek(self.starts[name])
            return list(struct.unpack(f"<{count}f", stream.read(4 * count)))


def read_gguf(path: Path) -> GgufHeader:
    """Read a GGUF file's header and check that every length and offset in it fits the file, that every type is known,
    and that the tensors lie one after another. Nothing is allocated for what a length only claims.

    Raises GqaError naming the file and what is wrong with it.
    """
    check_file(path)
    try:
        with path.open("rb") as stream:
            return _Reader(path, stream).header()
    except OSError as error:
        raise GqaError("a GGUF file cannot be read", got=f"{path}: {error.strerror}") from None


class _Reader:
    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream, self.position = path, stream, 0
        self.size = os.fstat(stream.fileno()).st_size

    def header(self) -> GgufHeader:
        if (magic := self.stream.read(4)) != b"GGUF":
            raise self.broken(f"a file that begins with {magic!r}", "b'GGUF'")
        self.position = 4
        if (version := self.scalar("I")) not in (2, 3):
            raise self.broken(f"version {version}", "2 or 3, little-endian")
        tensors = self.count("tensors", _MAX_TENSORS, _SMALLEST_TENSOR)
        keys = self.count("metadata keys", _MAX_KEYS, _SMALLEST_KEY)
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        alignment: Any = 32
        for _ in range(keys):
            key, kind = self.name("a key"), self.scalar("I")
            if key in metadata or key in lengths:
                raise self.broken(f"{key} twice")
            if kind == _ARRAY:
                lengths[key] = self.skip_array(key)
            elif (value := self.value(key, kind)) is not None:
                metadata[key] = value
            if key == "general.alignment":
                alignment = metadata.get(key)
                if kind != _UINT32 or alignment not in _ALIGNMENTS:
                    raise self.broken(f"an alignment of {alignment}", "a power of 2 from 8 to 1048576")
        return GgufHeader(self.path, metadata, lengths, *self.tensors(tensors, alignment))

    def tensors(self, count: int, alignment: int) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, int]]:
        """Shapes, types and starts."""
        shapes, types, offsets, end = {}, {}, {}, 0
        for _ in range(count):
            name, dimensions = self.name("a tensor name"), self.scalar("I")
            if not 1 <= dimensions <= 4:
                raise self.broken(f"tensor {name} of {dimensions} dimensions", "1 to 4")
            shape = tuple(self.scalar("Q") for _ in range(dimensions))  # innermost first, as ggml has it
            kind, offset = self.scalar("I"), self.scalar("Q")
            if name in shapes:
                raise self.broken(f"tensor {name} twice")
            if kind not in BLOCKS:
                known = ", ".join(block[0] for block in BLOCKS.values())
                raise GqaError(f"{self.path.name} has a quantisation type that gqa does not know",
                               got=f"type {kind} of tensor {name}", allowed=known)  # fmt: skip
            types[name], per_block, block_bytes = BLOCKS[kind]
            if 0 in shape or math.prod(shape) > 8 * self.size or shape[0] % per_block:
                allowed = f"rows of whole blocks of {per_block}, within the file's {self.size} bytes"
                raise self.broken(f"tensor {name} of shape {shape} as {types[name]}", allowed)
            begin = -(-end // alignment) * alignment
            if offset != begin:
                raise self.broken(f"tensor {name} begins at {offset}", f"{begin}, after the one before it")
            end = begin + math.prod(shape) // per_block * block_bytes
            shapes[name], offsets[name] = shape[::-1], offset
        data = -(-self.position // alignment) * alignment
        if data + end > self.size:
            raise self.truncated(data + end)
        return shapes, types, {name: data + offset for name, offset in offsets.items()}

    def value(self, key: str, kind: int) -> int | float | bool | str | None:
        if kind == _TEXT:
            length = self.scalar("Q")
            return self.text(length, key) if length <= _MAX_TEXT else self.skip(length)
        if kind not in _SCALARS:
            raise self.broken(f"{key} of type {kind}", "a scalar, a text or an array")
        value = self.scalar(_SCALARS[kind])
        # A decimal number that was stored in 32 bits, such as 1e-5, is taken for that number again.
        return float(f"{value:.7g}") if _SCALARS[kind] == "f" else value

    def skip_array(self, key: str) -> int:
        kind = self.scalar("I")
        if kind != _TEXT and kind not in _SCALARS:
            raise self.broken(f"{key}, an array of type {kind}", "an array of scalars or texts")
        width = 8 if kind == _TEXT else struct.calcsize(_SCALARS[kind])
        count = self.count(f"elements of {key}", _MAX_ELEMENTS, width)
        if kind == _TEXT:
            for _ in range(count):
                self.skip(self.scalar("Q"))
        else:
            self.skip(count * width)
        return count

    def count(self, what: str, most: int, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, which must be in the file."""
        count = self.scalar("Q")
        if count > min(most, (self.size - self.position) // smallest):
            raise self.broken(f"a file of {self.size} bytes that claims {count} {what}", f"at most {most}, in the file")
        return count

    def name(self, what: str) -> str:
        """A key or the name of a tensor."""
        length = self.scalar("Q")
        if length > _MAX_NAME:
            raise self.broken(f"{what} of {length} bytes", f"at most {_MAX_NAME}")
        name = self.text(length, what)
        if not name.isprintable():  # it ends up in messages on a terminal
            raise self.broken(f"{what} that is {name[:80]!a}", "printable characters")
        return name

    def text(self, length: int, what: str) -> str:
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"{what} that is not UTF-8") from None

    def scalar(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def take(self, count: int) -> bytes:
        self.check(count)
        data = self.stream.read(count)
        if len(data) < count:  # the file became shorter meanwhile
            raise self.truncated(self.position)
        return data

    def skip(self, count: int) -> None:
        self.check(count)
        self.stream.seek(count, os.SEEK_CUR)

    def check(self, count: int) -> None:
        self.position += count
        if self.position > self.size:
            raise self.truncated(self.position)

    def truncated(self, needed: int) -> GqaError:
        return GqaError(
            f"{self.path.name} is truncated",
            got=f"{self.size} bytes",
            allowed=f"at least {needed} bytes, as its header says",
            hint="download or copy the file again",
        )

    def broken(self, got: str, allowed: str | None = None) -> GqaError:
        return GqaError(f"{self.path.name} is not a sound GGUF file", got=got, allowed=allowed)
