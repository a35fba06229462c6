"""Read a converted folder again, to the last byte, and hold it against what was recorded when it was made.

The record (gqa-conversion.json) carries a hash of every tensor, of every header, of every other file, and of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gqa.config import parse_config
from gqa.convert.job import Job, plan_conversion
from gqa.convert.recipe import Recipe
from gqa.convert.result import REPORT, record_sha256, record_text
from gqa.errors import GqaError
from gqa.progress import Progress, silent
from gqa.source import Source, check_file, read_json
from gqa.weights.finite import all_finite
from gqa.weights.hashes import hash_bytes
from gqa.weights.header import Shard, is_name, read_header
from gqa.weights.layout import load_layout
from gqa.weights.reader import Checkpoint, read_tensor

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Difference = tuple[str, str]  # where: a file or a tensor; what is wrong with it


def verify(out: str | Path, source: Source | None = None, progress: Progress = silent) -> dict[str, Any]:
    """What is off in the converted folder OUT, as `differences`: rows of `where` and `what`, none if all is well.

    Every tensor: there, of the dtype, shape and bytes that were written, finite, and as config.json wants it. Every
    other file: as it was written. No weight file that the conversion did not write. With the parent at hand
    (`source`): tensors and settings that the recipe leaves alone are the parent's, byte for byte.
    Memory holds one tensor. Raises GqaError for a folder that records no conversion, and for another parent.
    """
    out = Path(out)
    record = _read_record(out)
    job = None if source is None else _plan(source, record)
    total = len(_tensor_names(record))
    done = compared = 0
    found = [*_altered_record(out, record), *_files(out, record)]
    for shard, hashes in _shards(out, record, found):
        for name in shard.tensors:
            tensor = read_tensor(shard, name)
            found += _tensor(shard, name, tensor, hashes["tensors"].get(name))
            if job is not None and _is_the_parents(job, name):
                compared += 1
                found += _against_parent(job, name, tensor)
            done += 1
            progress("verify tensors", done, max(done, total))
    found += _as_configured(out, job)
    return {
        "out": str(out),
        "sound": not found,
        "tensors": total,
        "files": len(record["hashes"]["shards"]) + len(record["hashes"]["files"]) + 1,
        "tensors_compared_with_parent": compared,
        "differences": [{"where": where, "what": what} for where, what in found],
    }


def _read_record(out: Path) -> dict[str, Any]:
    if not out.is_dir():
        raise GqaError("no converted folder at this path", got=out)
    record = read_json(out / REPORT, out)
    hashes = record.get("hashes")
    if not isinstance(hashes, dict) or not all(isinstance(hashes.get(key), dict) for key in ("shards", "files")):
        raise GqaError(
            f"{REPORT} records no hashes", got=out, allowed="a folder that this gqa converted", hint="convert again"
        )
    for name, shard in hashes["shards"].items():
        if Path(name).name != name or not isinstance(shard, dict) or not isinstance(shard.get("tensors"), dict):
            raise GqaError(
                f"{REPORT} is not what a conversion writes", got=f"{name[:80]!a}", allowed="hashes per tensor"
            )
    if not all(map(is_name, [*hashes["files"], *hashes["shards"], *_tensor_names(record)])):
        raise GqaError(f"{REPORT} is not what a conversion writes", got=out, allowed="names that can be printed")
    return record


def _tensor_names(record: Mapping[str, Any]) -> list[str]:
    return [name for hashes in record["hashes"]["shards"].values() for name in hashes["tensors"]]


def _plan(source: Source, record: Mapping[str, Any]) -> Job:
    """The conversion as it would be planned again. GqaError if this is not the parent that it was planned for."""
    identity = record.get("identity")
    if not isinstance(identity, dict) or not isinstance(identity.get("recipe"), dict):
        raise GqaError(f"{REPORT} is not what a conversion writes", got="no recipe in it", allowed="a recipe")
    try:
        recipe = Recipe(**identity["recipe"])
    except TypeError as error:
        raise GqaError(f"{REPORT} has a recipe of another version", got=error, hint="convert again") from None
    job = plan_conversion(source, recipe)
    if json.loads(json.dumps(job.identify(None)["source"])) != identity.get("source"):
        raise GqaError(
            "this is not the parent that OUT was converted from",
            got=source.folder,
            allowed="a folder with the same config.json and weight files",
        )
    return job


def _altered_record(out: Path, record: Mapping[str, Any]) -> Iterator[Difference]:
    same = (out / REPORT).read_text(encoding="utf-8") == record_text(record)
    if not same or record["hashes"].get("record") != record_sha256(record):
        yield REPORT, "not as it was written"


def _files(out: Path, record: Mapping[str, Any]) -> Iterator[Difference]:
    """Files that are not weights."""
    for name, expected in record["hashes"]["files"].items():
        if not os.path.lexists(out / name):
            yield name, "missing"
            continue
        try:
            content = check_file(out / name, out).read_bytes()
        except GqaError as error:
            yield name, error.what
            continue
        if hashlib.sha256(content).hexdigest() != expected:
            yield name, "not as it was written"
    known = record["hashes"]["shards"]
    for path in sorted(out.glob("*.safetensors")):
        if path.name not in known:
            yield path.name, "a weight file that the conversion did not write"


def _shards(out: Path, record: Mapping[str, Any], found: list[Difference]) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """The weight files that can be read, after what is wrong with their headers has been added to `found`."""
    for name, hashes in record["hashes"]["shards"].items():
        if not os.path.lexists(out / name):
            found.append((name, "missing"))
            continue
        try:
            shard = read_header(out / name)
        except GqaError as error:
            found.append((name, f"{error.what}: {error.got}"))
            continue
        if hashes.get("header") != _header_hash(shard):
            found.append((name, "another header than was written"))
        found += [(tensor, "missing") for tensor in hashes["tensors"] if tensor not in shard.tensors]
        yield shard, hashes


def _header_hash(shard: Shard) -> str:
    first = min((entry.start for entry in shard.tensors.values()), default=shard.nbytes)
    with shard.path.open("rb") as stream:
        return hash_bytes(stream.read(first))


def _tensor(shard: Shard, name: str, tensor: torch.Tensor, expected: str | None) -> Iterator[Difference]:
    if expected is None:
        yield name, "a tensor that the conversion did not write"
        return
    if hash_bytes(_bytes(tensor).numpy().data) != expected:
        yield name, f"other bytes than were written, in {shard.name}"
    if tensor.dtype in _FLOATS and not all_finite(tensor):
        yield name, "NaN or infinite values"


def _is_the_parents(job: Job, name: str) -> bool:
    changed = {entry.name for entries in job.changes.values() for entry in entries}
    return name in job.checkpoint and name not in changed


def _against_parent(job: Job, name: str, tensor: torch.Tensor) -> Iterator[Difference]:
    parents = job.checkpoint.read(name)
    if (tensor.dtype, tensor.shape) != (parents.dtype, parents.shape):
        yield name, "another dtype or shape than the parent's"
    elif not torch.equal(_bytes(tensor), _bytes(parents)):
        yield name, "other bytes than the parent's"


def _as_configured(out: Path, job: Job | None) -> Iterator[Difference]:
    """What any reader of the folder would stumble over: files that disagree, shapes that config.json does not give."""
    try:
        config = read_json(out / "config.json", out)
        shape = parse_config(config, out.name)
        load_layout(shape.model_type).check(Checkpoint(out), shape)
    except GqaError as error:
        yield "config.json" if "config" in error.what else out.name, error.what
        return
    if job is not None and config != json.loads(json.dumps(job.config)):
        yield "config.json", "not the parent's with fewer KV heads"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, without a copy: numpy has no bfloat16, and NaN equals nothing."""
    return tensor.reshape(-1).view(torch.uint8)
