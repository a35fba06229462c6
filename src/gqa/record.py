"""One JSON document for every command: what was asked, on which machine, what came out.

Figures carry their unit in their name (`kv_bytes_per_token`). `basis` says for each of them whether it was
`measured` on this machine or `predicted` by arithmetic. Reports are made from records alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gqa.errors import GqaError

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """command: the gqa command; inputs: what the user asked for, defaults filled in; results: figures, tables as
    lists of flat rows; basis: figure name -> `measured` or `predicted`; assumptions: sentences for the reader."""

    command: str
    inputs: Mapping[str, Any]
    results: Mapping[str, Any]
    basis: Mapping[str, str]
    assumptions: tuple[str, ...] = ()
    machine: Mapping[str, Any] = dataclasses.field(default_factory=lambda: describe_machine())
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: describe_versions())
    created: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
    )
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The document as JSON text; NaN and infinity become null, as JSON has neither."""
        return json.dumps(_clean(dataclasses.asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write whole or not at all."""
        write_text_atomic(path, self.to_json())


def read_record(path: Path, command: str | None = None) -> Record:
    """Read a record back; `command` says which command's record is wanted."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        fields = {field.name for field in dataclasses.fields(Record)}
        values: dict[str, Any] = {name: document[name] for name in fields}
        values["assumptions"] = tuple(values["assumptions"])
        record = Record(**values)
    except FileNotFoundError:
        raise GqaError("no record at this path", got=path, hint="gqa study writes study.json") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GqaError("not a record of gqa", got=f"{path}: {error}", allowed="a JSON file written by gqa") from None
    if not all(isinstance(part, Mapping) for part in (record.inputs, record.results, record.basis)):
        raise GqaError("not a record of gqa", got=path, allowed="a JSON file written by gqa")
    if record.schema != SCHEMA:
        raise GqaError("a record of another schema", got=record.schema, allowed=SCHEMA, hint="run the command again")
    if command is not None and record.command != command:
        raise GqaError(f"not a record of `gqa {command}`", got=f"a record of `gqa {record.command}`")
    return record


def describe_machine() -> dict[str, Any]:
    """What a reader needs to place a measurement; no host name, no user, no path."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
    }


def describe_versions(*more: str) -> dict[str, str]:
    """Versions of Python, gqa and the libraries that decide results, and `more` of them, without importing any."""
    versions = {"python": platform.python_version()}
    for name in ("gqa", "torch", "transformers", "safetensors", "tokenizers", "numpy", *more):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of a text in UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary sibling, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; a result is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
