"""Write safetensors files tensor by tensor: whole or not at all, with one tensor in memory at most."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from gqa.errors import GqaError
from gqa.record import write_text_atomic
from gqa.units import format_bytes
from gqa.weights.header import DTYPE_BYTES, TensorEntry, make_header
from gqa.weights.reader import TORCH_DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def describe(name: str, tensor: torch.Tensor) -> TensorEntry:
    """The header entry of a tensor in memory."""
    return TensorEntry(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def in_file_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Entries as a file holds them: the widest dtype first, so that every tensor is aligned to its elements."""
    return sorted(entries, key=lambda entry: -DTYPE_BYTES[entry.dtype])


def file_bytes(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> int:
    """Exact size of the file that write_shard makes of these entries."""
    entries = in_file_order(entries)
    return len(make_header(entries, metadata)) + sum(entry.nbytes for entry in entries)


def write_shard(
    path: Path,
    entries: Iterable[TensorEntry],
    write: Callable[[str, BinaryIO], None],
    metadata: Mapping[str, str],
) -> None:
    """Write one file: the header first, as all shapes are known, then `write(name, stream)` for one tensor after
    another, each of which appends exactly that tensor's bytes.

    The file appears under its name only when it is complete and on the disk. OSError (a full disk) passes through.
    """
    write_unpublished(path, entries, write, metadata)
    publish(path)


def write_unpublished(
    path: Path,
    entries: Iterable[TensorEntry],
    write: Callable[[str, BinaryIO], None],
    metadata: Mapping[str, str],
) -> None:
    """`write_shard` up to the complete file, which `publish` brings to the disk and under its name."""
    entries = in_file_order(entries)
    temporary = unpublished(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(make_header(entries, metadata))
            for entry in entries:
                before = stream.tell()
                write(entry.name, stream)
                assert stream.tell() - before == entry.nbytes, f"{entry.name}: not the bytes of its header"
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(path: Path) -> None:
    """Wait until what `write_unpublished` wrote is on the disk, and give it its name."""
    temporary = unpublished(path)
    try:
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def unpublished(path: Path) -> Path:
    """Where the bytes of a file lie until `publish` gives it its name."""
    return path.with_name(path.name + ".tmp")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory anyway as one file."""

    def write(name: str, stream: BinaryIO) -> None:
        write_tensor(stream, tensors[name])

    write_shard(path, [describe(name, tensor) for name, tensor in tensors.items()], write, metadata)


def write_tensor(stream: BinaryIO, tensor: torch.Tensor) -> None:
    """Append the bytes of a tensor in memory."""
    # Through uint8, as numpy has no bfloat16; flattened, as a scalar has no last dimension to reinterpret.
    stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_index(path: Path, shards: Mapping[str, Iterable[TensorEntry]]) -> None:
    """Write `model.safetensors.index.json`: which tensor is in which file, and the bytes of all tensors."""
    files = {entry.name: file for file, entries in shards.items() for entry in entries}
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    write_text_atomic(path, json.dumps(index, indent=2) + "\n")


def check_space(path: Path, needed_bytes: int) -> None:
    """GqaError unless the disk that will hold `path` (which need not exist yet) has room for that many bytes."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise GqaError(
            f"not enough space on the disk of {folder}",
            got=f"{format_bytes(free)} free",
            allowed=f"at least {format_bytes(needed_bytes)}",
            hint="free some, or choose another place for OUT",
        )


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (names, renames) to the disk, as fsync of a file does for its bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
