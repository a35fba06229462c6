"""A checkpoint folder: which tensor lies where, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import sys
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gqa.errors import GqaError
from gqa.weights.header import Shard, TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CHUNK_BYTES = 8 << 20
_SAMPLE_BYTES = 4096

assert sys.byteorder == "little", "safetensors stores little-endian numbers, which are read here as they lie"


class Checkpoint:
    """The weights of one model: `model.safetensors`, or shards under `model.safetensors.index.json`.

    Opening reads and checks every header (and no weight), so a truncated, missing or inconsistent file is told
    before any work begins. Raises GqaError; pickles and quantised checkpoints are refused.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise GqaError("no checkpoint folder at this path", got=self.folder)
        _refuse_quantised(self.folder)
        # transformers prefers the single file where both exist; so do we.
        self.sharded = not (self.folder / SINGLE).is_file()
        index = _read_index(self.folder) if self.sharded else {}
        files = sorted(set(index.values())) if self.sharded else [SINGLE]
        self.shards: tuple[Shard, ...] = tuple(read_header(self.folder / name) for name in files)

        self._shard_of: dict[str, Shard] = {}
        for shard in self.shards:
            for name in shard.tensors:
                if name in self._shard_of:
                    raise GqaError(f"tensor {name} is in two shards", got=f"{self._shard_of[name].name}, {shard.name}")
                self._shard_of[name] = shard
        for name, file in index.items():
            if name not in self._shard_of or self._shard_of[name].name != file:
                raise GqaError(f"tensor {name} is not where {INDEX} says", got=f"no such tensor in {file}")

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, shard by shard in the order of its bytes."""
        return tuple(self._shard_of)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def entry(self, name: str) -> TensorEntry:
        """Name, dtype, shape and place of a tensor; GqaError if there is none of this name."""
        if name not in self._shard_of:
            raise GqaError(f"the checkpoint has no tensor {name}", got=self.folder)
        return self._shard_of[name].tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.entry(name).dtype]

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the dtype it is stored in, on the CPU, in memory of its own."""
        self.entry(name)
        return read_tensor(self._shard_of[name], name)

    def copy_bytes(self, name: str, target: BinaryIO) -> None:
        """Append a tensor's bytes, as they lie in the file, to an open binary file."""
        self.entry(name)
        copy_tensor(self._shard_of[name], name, target)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from another one: per shard its size, its header and a sample of every
        tensor's bytes. Cheap (a few KiB per tensor), and the same for a copy of the folder."""
        return {
            shard.name: {
                "bytes": shard.nbytes,
                "header_sha256": shard.header_sha256,
                "sample_sha256": self._sample(shard),
            }
            for shard in self.shards
        }

    def modified(self) -> dict[str, int]:
        """Per shard the time of its last change in ns, which also tells a change that no sample hits."""
        return {shard.name: shard.path.stat().st_mtime_ns for shard in self.shards}

    @staticmethod
    def _sample(shard: Shard) -> str:
        digest = hashlib.sha256()
        with shard.path.open("rb", buffering=0) as stream:
            for entry in shard.tensors.values():
                for offset in (0, entry.nbytes // 2):
                    stream.seek(entry.start + offset)
                    digest.update(stream.read(min(_SAMPLE_BYTES, entry.nbytes - offset)))
        return digest.hexdigest()


def read_tensor(shard: Shard, name: str) -> torch.Tensor:
    """Read one tensor of a file.

    Plain reads rather than a mapping of the file: only these bytes ever count as this process's memory, and a file
    that shrinks under way is an error instead of a crash.
    """
    entry = shard.tensors[name]
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    view, position = buffer.numpy().data, 0
    with shard.path.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        while position < entry.nbytes:
            position += _fill(stream, view[position:], shard)
    return buffer.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def copy_tensor(shard: Shard, name: str, target: BinaryIO) -> None:
    """Append one tensor's bytes to an open binary file, a few MiB at a time."""
    entry = shard.tensors[name]
    buffer, left = memoryview(bytearray(min(_CHUNK_BYTES, entry.nbytes))), entry.nbytes
    with shard.path.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        while left:
            count = _fill(stream, buffer[:left], shard)
            target.write(buffer[:count])
            left -= count


def _fill(stream: RawIOBase, buffer: memoryview, shard: Shard) -> int:
    count = stream.readinto(buffer)
    if not count:
        raise GqaError(f"{shard.name} changed while it was read", got="fewer bytes than before", hint="run again")
    return count


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        raise _no_weights(folder)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = dict(index)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GqaError(f"{INDEX} is not an index of shards", got=f"{type(error).__name__}: {error}") from None
    for name, file in pairs.items():
        # A name with a folder in it would read, and by mirroring write, outside of this checkpoint.
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise GqaError(
                f"{INDEX} places {name} in a file it may not name",
                got=repr(file),
                allowed="the name of a .safetensors file in the same folder",
            )
    missing = sorted({file for file in pairs.values() if not (folder / file).is_file()})
    if missing:
        raise GqaError(
            f"a shard named in {INDEX} is missing", got=", ".join(missing), hint="download or copy the file again"
        )
    if not pairs:
        raise GqaError(f"{INDEX} names no tensor", got=path)
    return pairs


def _no_weights(folder: Path) -> GqaError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return GqaError(
            "a pickle checkpoint is not opened: loading one can run any code hidden in it",
            got=", ".join(pickles[:3]) + (", ..." if len(pickles) > 3 else ""),
            allowed="safetensors files",
            hint="save the model with save_pretrained() of transformers where you trust its author",
        )
    return GqaError("a folder without weights", got=folder, allowed=f"{SINGLE}, or {INDEX} and the shards it names")


def _refuse_quantised(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the configuration tells what is wrong with it
    found = isinstance(config, dict) and (config.get("quantization_config") or config.get("compression_config"))
    if found or (folder / "quantize_config.json").is_file():
        method = found.get("quant_method", "unnamed") if isinstance(found, dict) else "GPTQ"
        raise GqaError(
            "a quantised checkpoint cannot be read: its weights are codes, not numbers",
            got=f"quantisation {method}",
            allowed="fp32, fp16 or bf16 weights",
            hint="take the checkpoint it was made from, and quantise afterwards",
        )
