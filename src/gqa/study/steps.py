"""Steps of long work, each remembered in a file of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gqa.errors import GqaError
from gqa.progress import Progress
from gqa.record import write_text_atomic

_FORMAT = 1  # of the files: raise it when an old one must not be taken for a new one


def check_folder(out: Path) -> None:
    """Raise GqaError if `out` holds anything that is not the work of steps."""
    if out.is_dir() and any(out.iterdir()) and not (out / "steps" / "identity.json").exists():
        raise GqaError("the folder holds something else", got=out, hint="choose another one with --out")
    if out.exists() and not out.is_dir():
        raise GqaError("not a folder", got=out, hint="choose another place with --out")


class Steps:
    """Named steps of one piece of work in the folder `out`/steps; `identity` says which work it is.

    Raises GqaError if the folder holds other work, or other things.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], total: int, progress: Progress) -> None:
        self.folder, self.total, self.progress = out / "steps", total, progress
        self.done = 0
        self.seconds = 0.0  # spent on all steps so far, in this run and former ones
        wanted = json.loads(json.dumps({"format": _FORMAT, **identity}))
        path = self.folder / "identity.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(key for key in wanted if wanted[key] != found.get(key))
            if different:
                raise GqaError(
                    "the folder holds another study",
                    got=f"{out} (different: {', '.join(different)})",
                    hint=f"choose another folder with --out, or remove {out}",
                )
        else:
            check_folder(out)
            write_text_atomic(path, json.dumps(wanted, indent=2) + "\n")

    def do(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step: from its file, or by doing the work now."""
        path = self.folder / f"{name}.json"
        if path.exists():
            step = json.loads(path.read_text(encoding="utf-8"))
        else:
            self.progress("study", self.done, self.total, name)
            began = time.perf_counter()
            result = work()
            step = {"seconds": time.perf_counter() - began, "result": result}
            write_text_atomic(path, json.dumps(step, indent=2) + "\n")
        self.done += 1
        self.seconds += step["seconds"]
        self.progress("study", self.done, self.total, name)
        return step["result"]
