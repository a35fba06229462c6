"""The work folder of a conversion, `OUT.partial/`: what is finished in it survives a kill, and one process owns it.

OUT.partial/lock                   held by the process at work; the system lets go of it when that process dies
OUT.partial/journal.json           what is being converted, and the reports of the finished layers
OUT.partial/layer-0003.safetensors the changed tensors of a finished layer
OUT.partial/states/                activations of the calibration text before the next layer, where memory is short
OUT.partial/training/              checkpoints of a distillation
OUT.partial/distilled-0003.safetensors the changed tensors of a layer after the distillation
OUT.partial/result/                what becomes OUT by one rename
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa.errors import GqaError
from gqa.record import write_text_atomic
from gqa.weights.writer import sync_folder

_FORMAT = 1


class Journal:
    """What a work folder holds. A step counts once it is written here, so a kill loses at most the step under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reports: list[dict[str, Any]] = []
        self.measured: dict[str, Any] | None = None
        self.distilled: dict[str, Any] | None = None  # the report of a finished distillation
        self.measured_distilled: dict[str, Any] | None = None
        self.answers: dict[str, Any] | None = None
        self._identity: Mapping[str, Any] = {}

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def states(self) -> Path:
        return self.folder / "states"

    @property
    def training(self) -> Path:
        return self.folder / "training"

    def forget_training(self) -> None:
        shutil.rmtree(self.training, ignore_errors=True)

    def forget_states(self) -> None:
        shutil.rmtree(self.states, ignore_errors=True)

    @property
    def empty(self) -> bool:
        """Nothing is finished that would be worth keeping."""
        return not self.reports and not any(self.result.glob("*.safetensors"))

    def layer_path(self, layer: int) -> Path:
        """The file of a layer as it is now: converted, or distilled."""
        return self.folder / f"layer-{layer:04d}.safetensors" if self.distilled is None else self.distilled_path(layer)

    def distilled_path(self, layer: int) -> Path:
        return self.folder / f"distilled-{layer:04d}.safetensors"

    def finished(self, identity: Mapping[str, Any]) -> bool:
        """The result of this conversion has been moved to OUT, and only tidying up was missed."""
        found = self._read()
        ours = found is None or found.get("identity", {}).items() >= _plain(identity).items()
        return ours and not self.result.exists()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Start, or go on where a former run of the same conversion was stopped.

        Raises GqaError if the folder holds another conversion, or something else altogether.
        """
        if (self.folder / "journal.json").exists():
            self._resume(identity)
        elif strange := sorted(path.name for path in self.folder.iterdir() if not self._is_a_beginning(path)):
            (self.folder / "lock").unlink()  # the only thing of ours in there
            raise GqaError(
                "the work folder's name is taken by something else",
                got=f"{self.folder} with {', '.join(strange[:3])}",
                hint="move it away, or choose another OUT",
            )
        self._identity = identity
        self._sweep()
        self.result.mkdir(exist_ok=True)
        self._write()

    def finish_layer(self, report: dict[str, Any]) -> None:
        self.reports.append(report)
        self._write()

    def finish_measuring(self, measured: dict[str, Any]) -> None:
        self.measured = measured
        self._write()

    def finish_distilling(self, report: dict[str, Any]) -> None:
        """From here on the files of the distilled layers count. What was measured of the layers that the distillation
        began with says nothing about them any more."""
        self.distilled = report
        for layer in self.reports:
            for name in [name for name in layer if "_error" in name]:
                layer[f"{name}_before_distillation"] = layer.pop(name)
        self._write()
        self.forget_training()

    def finish_measuring_distilled(
        self, measured: dict[str, Any], hidden_errors: Sequence[Mapping[str, float]]
    ) -> None:
        self.measured_distilled = measured
        for layer, errors in zip(self.reports, hidden_errors, strict=True):
            layer |= errors
        self._write()

    def finish_answers(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self._write()

    def discard(self) -> None:
        """Remove the work folder, the journal last: what a kill leaves is still known as ours."""
        shutil.rmtree(self.result, ignore_errors=True)
        self.forget_states()
        self.forget_training()
        for path in self.folder.iterdir():
            if path.name not in ("journal.json", "lock"):
                path.unlink()
        for name in ("journal.json", "lock"):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def _resume(self, identity: Mapping[str, Any]) -> None:
        document = self._read()
        differences = ["no readable journal"]
        if document is not None and document.get("format") == _FORMAT:
            differences = _differences(document["identity"], _plain(identity))
        if document is None or differences:
            raise GqaError(
                f"{self.folder} holds another unfinished conversion",
                got="; ".join(differences[:5]),
                hint=f"finish it with the arguments it began with, or discard it: rm -r {self.folder}",
            )
        if self.result.is_dir():  # else the result has been moved to OUT, and from there elsewhere: begin again
            self.reports, self.measured = document["layers"], document.get("measured")
            self.distilled = document.get("distilled")
            self.measured_distilled = document.get("measured_distilled")
            self.answers = document.get("answers")

    def _read(self) -> dict[str, Any] | None:
        try:
            document = json.loads((self.folder / "journal.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return document if isinstance(document, dict) else None

    def _is_a_beginning(self, path: Path) -> bool:
        """What may lie in the folder before its first journal does."""
        begun = path == self.result and path.is_dir() and not any(path.iterdir())
        return begun or path.name == "lock" or path.name.startswith(".journal.json.")

    def _sweep(self) -> None:
        """Remove what a kill left half written. Finished shards stay; the small files of the result are made anew."""
        for path in self.folder.rglob("*.tmp"):
            path.unlink()
        if self.result.is_dir():
            for path in self.result.iterdir():
                if path.suffix != ".safetensors":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self) -> None:
        document: dict[str, Any] = {"format": _FORMAT, "identity": self._identity, "layers": self.reports}
        document["measured"] = self.measured
        if self.distilled is not None:
            document |= {"distilled": self.distilled, "measured_distilled": self.measured_distilled}
        if self.answers is not None:
            document["answers"] = self.answers
        write_text_atomic(self.folder / "journal.json", json.dumps(document, allow_nan=False))
        sync_folder(self.folder)


def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[Journal]:
    """Own the work folder of OUT, which is created if need be. GqaError if another process owns it."""
    folder = work_folder(out)
    if folder.is_symlink():  # what lies at its end is not ours to work in
        raise GqaError(
            "the work folder's name is taken by a link", got=folder, hint="move it away, or choose another OUT"
        )
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its owner has just finished and removed the folder
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, folder / "lock"):
                break
        except BlockingIOError:
            os.close(handle)
            raise GqaError("another process is writing this conversion", got=out, hint="wait for it") from None
        os.close(handle)
    try:
        yield Journal(folder)
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: its former owner may have removed it between our open and
    our lock, and a lock on a removed file keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [text for key in keys for text in _differences(there.get(key), here.get(key), f"{path} {key}".strip())]
    if there == here:
        return []
    if path.startswith("recipe "):
        before, now = ("not set" if value is None else value for value in (there, here))
        return [f"{path.removeprefix('recipe ').replace('_', ' ')} {before} there, {now} here"]
    return [f"another {path.replace('_', ' ')}"]
