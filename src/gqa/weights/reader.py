"""A checkpoint folder: which tensor lies where, read one tensor at a time."""

from __future__ import annotations

import hashlib
import os
import sys
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gqa.errors import GqaError
from gqa.source import MAX_JSON_BYTES, check_file, read_json
from gqa.weights.finite import all_finite
from gqa.weights.header import Shard, TensorEntry, file_state, is_name, parse_unique, read_header
from gqa.weights.sizes import INDEX, SINGLE

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

# What the tensors beside a quantised weight are called: GPTQ and AWQ, bitsandbytes, fp8, compressed-tensors.
_QUANTISED_NAMES = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (
        ".absmax",
        ".quant_map",
        ".SCB",
        ".quant_state.bitsandbytes__nf4",
        ".quant_state.bitsandbytes__fp4",
    ),
    "fp8 or compressed-tensors": (".weight_scale", ".weight_scale_inv", ".weight_packed"),
}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8")
_CHUNK_BYTES = 8 << 20
_MAX_FILE_NAME = 200  # bytes: what file systems take, less the endings that are added to it
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
        self.sharded = not os.path.lexists(self.folder / SINGLE)
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
        if self.sharded and (unnamed := [name for name in self._shard_of if name not in index]):
            raise GqaError(
                f"{self._shard_of[unnamed[0]].name} has tensors that {INDEX} does not name",
                got=", ".join(unnamed[:3]) + (", ..." if len(unnamed) > 3 else ""),
                allowed="shards and an index that agree",
                hint="download the index again, or save the model again with save_pretrained() of transformers",
            )
        self._refuse_quantised_tensors()

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

    def read_finite(self, name: str) -> torch.Tensor:
        """read, where NaN or an infinity would spoil what is calculated: they are a GqaError."""
        tensor = self.read(name)
        if not all_finite(tensor):
            raise GqaError(f"tensor {name} holds NaN or infinite values", allowed="finite weights")
        return tensor

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

    def check_unchanged(self) -> None:
        """GqaError if a shard was written to or replaced since its header was read when this folder was opened."""
        for shard in self.shards:
            try:
                same = file_state(shard.path.stat()) == shard.state
            except FileNotFoundError:
                same = False
            if not same:
                raise GqaError(
                    "the source changed while it was converted",
                    got=shard.path,
                    allowed="files that stay as they were when they were opened",
                    hint="convert again when nothing writes to them any more",
                )

    def _refuse_quantised_tensors(self) -> None:
        for name, shard in self._shard_of.items():
            kinds = [kind for kind, suffixes in _QUANTISED_NAMES.items() if name.endswith(suffixes)]
            dtype = shard.tensors[name].dtype
            if name.endswith(".weight") and dtype in _CODES:
                kinds.append(f"dtype {dtype}")
            if kinds:
                raise _quantised(f"{kinds[0]}: tensor {name}")

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
        raise GqaError(
            f"{shard.name} changed while it was read",
            got="fewer bytes than before",
            allowed=f"{shard.nbytes} bytes, as when it was opened",
            hint="run again",
        )
    return count


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not os.path.lexists(path):
        raise _no_weights(folder)
    check_file(path, folder)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        files = parse_unique(content)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_index(f"{type(error).__name__}: {error}") from None
    if not isinstance(files, dict):
        raise _no_index("a weight_map that is not a table")
    if not files:
        raise GqaError(f"{INDEX} names no tensor", got=path, allowed="a file for every tensor")
    for name, file in files.items():
        # A name with a folder in it would read, and by mirroring write, outside of this checkpoint.
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise _misplaced(name, file)
        if not file.isprintable() or len(file.encode()) > _MAX_FILE_NAME:
            raise _misplaced(name, file)
        if not is_name(name):
            raise _no_index(f"a tensor named {name[:80]!a}")
    missing = sorted({file for file in files.values() if not os.path.lexists(folder / file)})
    if missing:
        raise GqaError(
            f"a shard named in {INDEX} is missing",
            got=", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""),
            allowed="all the files that it names",
            hint="download or copy the file again",
        )
    return files


def _no_index(got: str) -> GqaError:
    return GqaError(f"{INDEX} is not an index of shards", got=got, allowed='{"weight_map": {tensor: file, ...}}')


def _misplaced(name: str, file: Any) -> GqaError:
    return GqaError(
        f"{INDEX} places a tensor in a file it may not name",
        got=f"{name[:80]!a} in {file!a:.80}",
        allowed="the name of a .safetensors file in the same folder",
    )


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
    path = folder / "config.json"
    if os.path.lexists(path):
        config = read_json(path, folder)
        if found := config.get("quantization_config") or config.get("compression_config"):
            method = found.get("quant_method", "unnamed") if isinstance(found, dict) else "unnamed"
            raise _quantised(f"quantisation {method!s:.80}")
    if (folder / "quantize_config.json").is_file():
        raise _quantised("quantisation GPTQ: quantize_config.json")


def _quantised(got: str) -> GqaError:
    return GqaError(
        "a quantised checkpoint cannot be read: its weights are codes, not numbers",
        got=got,
        allowed="fp32, fp16 or bf16 weights",
        hint="take the checkpoint it was made from, and quantise afterwards",
    )
