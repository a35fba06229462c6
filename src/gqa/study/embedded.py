"""The embedded default: a small multi-head Llama that comes with the package, and text that every Python has.

The text is the source of Python's standard library, split by file. `benchmarks/quality/train_parent.py` trained the
parent, once; its folder's gqa_training.json has the recipe, the text, the losses and a hash of every file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
from pathlib import Path

from gqa.errors import GqaError

# Not the library's own prose or code: other people's packages, tests, tables (code pages, help topics) and files
# that an installation generates. A part of them exists in some Pythons only, and none of them is typical source text.
LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_GENERATED = ("_sysconfigdata", "sitecustomize", "_sysconfig_vars")
METADATA = "gqa_training.json"
SHIPPED = Path(__file__).parent / "parent"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files of the standard library, sorted; a file belongs to exactly one of the three parts."""

    train: tuple[Path, ...]
    calibration: tuple[Path, ...]
    test: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Parent:
    """A trained parent: a transformers folder with its tokenizer, and what it took to train it."""

    folder: Path
    parameters: int
    train_tokens: int
    train_seconds: float
    final_loss_nats: float

    @classmethod
    def read(cls, folder: Path) -> Parent:
        """What a folder's gqa_training.json says."""
        facts = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        return cls(folder, *(facts[field.name] for field in dataclasses.fields(cls)[1:]))


def embedded_parent(folder: Path = SHIPPED) -> Parent:
    """The parent that comes with the package: 8 query heads on 8 KV heads. Raises GqaError if a file is damaged."""
    try:
        hashes = json.loads((folder / METADATA).read_text(encoding="utf-8"))["sha256"]
        wrong = [name for name, known in hashes.items() if _sha256(folder / name) != known]
        parent = Parent.read(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(f"{folder}: {error}") from None
    if wrong:
        raise _damaged(f"{folder}: other content than was installed in {', '.join(wrong)}")
    return parent


def stdlib_corpus(root: Path | None = None) -> Corpus:
    """The running interpreter's standard library (`root` for another folder), split by file: 84 % train,
    8 % calibration, 8 % test.

    A file's part follows from a hash of its path relative to the library, so the split is the same on every machine.
    The embedded parent saw no file of the calibration and test parts of Python 3.11, 3.12 and 3.13, whichever of them
    runs now, and no file that shares 8 lines in a row with one of those.
    Copies of the same content count once, in the part of the first one. Raises GqaError if there are too few files.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    parts: dict[str, list[Path]] = {"train": [], "calibration": [], "test": []}
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if LEFT_OUT.intersection(relative.parts) or relative.name.startswith(_GENERATED):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not is_text(content):
            continue
        seen.add(digest)
        draw = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:8], "big") % 100
        parts["test" if draw < 8 else "calibration" if draw < 16 else "train"].append(path)
    if not all(parts.values()):
        raise GqaError(
            "the standard library's sources are not on this machine",
            got=f"{sum(map(len, parts.values()))} .py files in {root}",
            hint="use a Python with its library as files, or study a model of your own: gqa study MODEL --text FILE",
        )
    return Corpus(**{name: tuple(files) for name, files in parts.items()})


def _damaged(got: str) -> GqaError:
    return GqaError(
        "the parent that comes with gqa is damaged",
        got=got,
        hint="install gqa again, or study a model of your own: gqa study MODEL --text FILE",
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_text(content: bytes) -> bool:
    try:
        return bool(content.decode("utf-8").strip()) and b"\0" not in content
    except UnicodeDecodeError:
        return False
