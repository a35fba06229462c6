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


def check_folder(out: Path, option: str = "--out") -> None:
    """Raise GqaError if `out` holds anything that is not the work of steps. option: the one that names `out`."""
    if out.is_dir() and any(out.iterdir()) and not (out / "steps" / "identity.json").exists():
        raise GqaError("the folder holds something else", got=out, hint=f"choose another one with {option}")
    if out.exists() and not out.is_dir():
        raise GqaError("not a folder", got=out, hint=f"choose another place with {option}")


class Steps:
    """Named steps of one piece of work in the folder `out`/steps; `identity` says which work it is. what: the name of
    such work, as progress and errors give it; option: the one that names `out`.

    Raises GqaError if the folder holds other work, or other things.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        total: int,
        progress: Progress,
        *,
        what: str = "study",
        option: str = "--out",
    ) -> None:
        self.folder, self.total, self.progress, self.what = out / "steps", total, progress, what
        self.done = 0
        self.seconds = 0.0  # spent on all steps so far, in this run and former ones
        wanted = json.loads(json.dumps({"format": _FORMAT, **identity}))
        path = self.folder / "identity.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(key for key in wanted if wanted[key] != found.get(key))
            if different:
                raise GqaError(
                    f"the folder holds another {what}",
                    got=f"{out} (different: {', '.join(different)})",
                    hint=f"choose another folder with {option}, or remove {out}",
                )
        else:
            check_folder(out, option)
            write_text_atomic(path, json.dumps(wanted, indent=2) + "\n")

    def do(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step: from its file, or by doing the work now."""
        step = self.find(name)
        if step is None:
            self.progress(self.what, self.done, self.total, name)
            began = time.perf_counter()
            result = work()
            step = {"seconds": time.perf_counter() - began, "result": result}
            write_text_atomic(self._path(name), json.dumps(step, indent=2) + "\n")
        self.done += 1
        self.seconds += step["seconds"]
        self.progress(self.what, self.done, self.total, name)
        return step["result"]

    def find(self, name: str) -> dict[str, Any] | None:
        """A finished step, `seconds` and `result`; None for one that is not finished."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
