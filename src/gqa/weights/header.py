"""The header of a safetensors file, checked against the file before a single weight is read.

A file is `8 bytes little-endian n | n bytes of JSON | data`; the JSON maps a tensor's name to its dtype, shape and
`data_offsets` [begin, end) within the data. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa.errors import GqaError
from gqa.source import check_file
from gqa.units import format_bytes

# The reference implementation refuses longer headers too; a real one has about 100 bytes per tensor.
MAX_HEADER_BYTES = 100_000_000

# More than any tensor has, few enough for arithmetic on them to be quick and never to overflow elsewhere.
_MAX_DIMENSIONS = 32
_MAX_COUNT = (1 << 63) - 1
_MAX_NAME = 1000

# Name in the header -> bytes per element. Formats below a byte per element only occur in quantised checkpoints.
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `dtype` as the header names it, and where its first byte lies in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes."""

    path: Path
    nbytes: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    header_sha256: str
    state: tuple[int, ...]  # file_state when the header was read

    @property
    def name(self) -> str:
        return self.path.name


def file_state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to or replaced: its size, its inode, the time of its last change in ns."""
    return status.st_size, status.st_ino, status.st_mtime_ns


def read_header(path: Path) -> Shard:
    """Read a file's header and check that it describes the whole file: known dtypes, sizes that agree with the
    shapes, no overlap, no gap, nothing beyond the end.

    Raises GqaError naming the file and what is wrong with it.
    """
    check_file(path, path.parent)
    try:
        with path.open("rb") as stream:
            opened = os.fstat(stream.fileno())
            size = opened.st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise _broken(
                    path,
                    f"a file of {size} bytes whose header claims {length if len(prefix) == 8 else '?'}",
                    f"a header of at most {format_bytes(MAX_HEADER_BYTES)} within the file",
                )
            header = stream.read(length)
    except OSError as error:
        raise GqaError("a weight file cannot be read", got=f"{path}: {error.strerror}") from None

    document = _parse(path, header)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(part) for pair in metadata.items() for part in pair):
        raise _broken(path, "metadata that is not a table of texts")
    first = 8 + length
    placed = sorted((_entry(path, name, value, first) for name, value in document.items()), key=_position)

    position = first
    for entry in placed:
        if entry.start != position:
            raise _broken(path, f"tensor {entry.name} begins at {entry.start}", f"{position}, where the last one ends")
        position += entry.nbytes
    if size < position:
        raise GqaError(
            f"{path.name} is truncated",
            got=f"{size} bytes",
            allowed=f"{position} bytes, as its header says",
            hint="download or copy the file again",
        )
    if size > position:
        raise _broken(path, f"{size - position} bytes after the last tensor")
    return Shard(
        path=path,
        nbytes=size,
        tensors={entry.name: entry for entry in placed},
        metadata=metadata,
        header_sha256=hashlib.sha256(header).hexdigest(),
        state=file_state(opened),
    )


def make_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds the tensors one after another in the order given.

    Padded with spaces to a multiple of 8 bytes, so that data which begins with the widest dtype is aligned.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _position(entry: TensorEntry) -> tuple[int, int]:
    return entry.start, entry.nbytes


def parse_unique(text: bytes) -> Any:
    """JSON in which no object has a key twice: readers differ in which of the two they believe.

    Raises ValueError (UnicodeDecodeError for what is not UTF-8) and RecursionError.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{name[:_MAX_NAME]!a} twice")
        return table

    return json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)


def is_name(name: str) -> bool:
    """Whether a tensor may be called this. Names end up in messages on a terminal, which obeys control characters."""
    return name.isprintable() and len(name) <= _MAX_NAME


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise _broken(path, "a header that is not a table of tensors")
    try:
        return parse_unique(header)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"a header that is not sound JSON ({error})") from None


def _entry(path: Path, name: str, value: Any, first: int) -> TensorEntry:
    if not is_name(name):
        raise _broken(path, f"a tensor named {name[:80]!a}", f"at most {_MAX_NAME} printable characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name} described by {_short(value)}", "dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _broken(path, f"tensor {name} of dtype {_short(dtype)}", ", ".join(DTYPE_BYTES))
    if not _counts(shape, _MAX_DIMENSIONS) or not _counts(offsets, 2) or len(offsets) != 2:
        allowed = f"at most {_MAX_DIMENSIONS} dimensions and 2 offsets from 0 to {_MAX_COUNT}"
        raise _broken(path, f"tensor {name} of shape {_short(shape)} at {_short(offsets)}", allowed)
    entry = TensorEntry(name, dtype, tuple(shape), first + offsets[0])
    if math.prod(max(size, 1) for size in shape) > _MAX_COUNT // DTYPE_BYTES[dtype]:
        raise _broken(path, f"tensor {name} of shape {_short(shape)}", f"at most {_MAX_COUNT} bytes")
    if offsets[1] - offsets[0] != entry.nbytes:
        raise _broken(path, f"tensor {name} on {offsets[1] - offsets[0]} bytes", f"{entry.nbytes}, as its shape says")
    return entry


def _counts(value: Any, most: int) -> bool:
    # type() and not isinstance(): True is an int, but no count.
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item <= _MAX_COUNT for item in value)
    )


def _is_text(value: Any) -> bool:
    """A text that UTF-8 can hold: JSON can spell half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    """A value as ASCII of bounded length, however deep, long or strange it is."""
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()[:80]


def _broken(path: Path, got: str, allowed: str | None = None) -> GqaError:
    return GqaError(f"{path.name} is not a sound safetensors file", got=got, allowed=allowed)
