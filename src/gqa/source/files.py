"""Files from elsewhere: what may be opened, and JSON that may be trusted to be JSON."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from gqa.errors import GqaError

# A real config.json has a few KiB, a tokenizer.json or an index of shards at most some tens of MiB.
MAX_JSON_BYTES = 100_000_000

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def check_file(path: Path, folder: Path | None = None) -> Path:
    """The path, if it is an ordinary file, and, where a folder is given, one that belongs to it; else GqaError.

    A pipe would be waited for, and a device never ends. A symbolic link that leads out of a model folder could have
    any file of this machine copied into a result that is then published; only the hub's own cache, whose folders
    are links from `snapshots/<revision>/` to `blobs/`, may have such links.
    """
    try:
        mode = path.stat().st_mode
        real = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # no such file, a NUL in its name, links in a circle
        reason = getattr(error, "strerror", None) or error
        raise GqaError("a file cannot be read", got=f"{_shown(path)}: {reason}") from None
    if not stat.S_ISREG(mode):
        raise GqaError("not an ordinary file", got=f"{path}: {_KINDS.get(stat.S_IFMT(mode), 'a device')}")
    if folder is not None:
        home = folder.resolve()
        allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
        if not any(real.is_relative_to(place) for place in allowed):
            raise GqaError(
                f"{path.name} is a link out of the model folder",
                got=f"{path} -> {real}",
                allowed="a file in the folder, or a link within it",
                hint="put the file itself there, if you trust where the link leads",
            )
    return path


def read_json(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """The JSON object in a file from elsewhere. GqaError for what check_file refuses, for more than MAX_JSON_BYTES,
    and for what is not an object of valid Unicode."""
    check_file(path, folder)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        document = json.loads(content.decode("utf-8"))
        # JSON can spell half a character, which no file that is written from this could hold.
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise GqaError(f"{path.name} cannot be read", got=f"{path}: {error}", allowed="a JSON object") from None
    if not isinstance(document, dict):
        raise GqaError(f"{path.name} is not a JSON object", got=f"{path}: a {type(document).__name__}")
    return document


def _shown(path: Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))
