"""Train the parent that the package ships, on Python source text that is installed here: about an hour on one core.

    OMP_NUM_THREADS=1 python benchmarks/quality/train_parent.py --work build/parent
    python benchmarks/quality/train_parent.py --work build/parent --held-out /usr/lib/python3.12 /usr/lib/python3.13

Text: the train part of the running Python's standard library, and every package installed beside it, tests left out,
at most 2 MiB of each package. No file that shares 8 lines in a row with a calibration or test file of the standard
library is in it; --held-out names the libraries of further Pythons whose calibration and test files are held out as
well: a module may lie at another path in another version, and so in another part. A training that was stopped resumes
when the command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from gqa.evaluate import load_model
from gqa.evaluate.load import quiet_transformers
from gqa.record import describe_machine, describe_versions, write_text_atomic
from gqa.source import write_legacy_keys
from gqa.study.embedded import LEFT_OUT, METADATA, SHIPPED, is_text, stdlib_corpus
from gqa.study.train_parent import ParentRecipe, train_parent

PACKAGE_BYTES = 2 << 20  # of each installed package at most, so that no large one sets the style
FILE_BYTES = 256 << 10  # larger ones are tables and generated code
RUN_LINES = 8
LOSS_ROWS = 5  # of the training's losses are one in the shipped folder
RECIPE = ParentRecipe(attention="gqa")


def installed(root: Path) -> Iterator[tuple[str, Path]]:
    """(package, file) of all installed packages, without their tests; a package's files in the order of a hash."""
    of_package: dict[str, list[Path]] = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not LEFT_OUT.intersection(relative.parts):
            of_package.setdefault(relative.parts[0], []).append(path)
    for package, paths in sorted(of_package.items()):
        for path in sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()):
            yield package, path


def lines_of(text: str) -> list[str]:
    """The text's lines without indentation, and without those that are empty."""
    return [line for line in map(str.strip, text.splitlines()) if line]


def runs(lines: Sequence[str]) -> set[int]:
    """Hashes of all RUN_LINES lines in a row, or of the whole text where it is shorter."""
    return {hash(tuple(lines[i : i + RUN_LINES])) for i in range(max(1, len(lines) - RUN_LINES + 1))}


class Gathering:
    """Texts that are new, and share no run of lines with a text that is held out."""

    def __init__(self, held_out: Iterable[Path]) -> None:
        self.held_out: set[int] = set()
        self.seen: set[int] = set()
        self.texts: list[str] = []
        self.left_out = {"copies": 0, "shared with held-out text": 0}
        for path in held_out:
            self.held_out |= runs(lines_of(path.read_text(encoding="utf-8")))

    def add(self, path: Path) -> int:
        """Take a file in; its bytes, 0 where it is left out."""
        content = path.read_bytes()
        if len(content) > FILE_BYTES or not is_text(content):
            return 0
        text = content.decode("utf-8")
        lines = lines_of(text)
        if (whole := hash(tuple(lines))) in self.seen:
            self.left_out["copies"] += 1
            return 0
        if not self.held_out.isdisjoint(runs(lines)):
            self.left_out["shared with held-out text"] += 1
            return 0
        self.seen.add(whole)
        self.texts.append(text)
        return len(content)


def gather(held_out: Sequence[Path]) -> tuple[list[str], dict[str, Any]]:
    """The texts, and their description."""
    own = stdlib_corpus()
    corpora = [own, *map(stdlib_corpus, held_out)]
    gathering = Gathering(path for corpus in corpora for path in (*corpus.calibration, *corpus.test))
    library = sum(map(gathering.add, own.train))
    library_files = len(gathering.texts)
    root = Path(sysconfig.get_path("purelib"))
    distributions = packages_distributions()
    packages: dict[str, dict[str, Any]] = {}
    for package, path in installed(root):
        row = packages.setdefault(package, {"files": 0, "bytes": 0})
        if row["bytes"] < PACKAGE_BYTES and (size := gathering.add(path)):
            row["files"] += 1
            row["bytes"] += size
    packages = {name: row for name, row in packages.items() if row["files"]}
    for name, row in packages.items():
        found = distributions.get(name.removesuffix(".py"))
        row["version"] = version(found[0]) if found else None
    return gathering.texts, {
        "python": platform.python_version(),
        "held_out_of": [f"python{platform.python_version()}", *(root.name for root in held_out)],
        "standard_library": {"files": library_files, "bytes": library},
        "packages": packages,
        "files": len(gathering.texts),
        "bytes": library + sum(row["bytes"] for row in packages.values()),
        "files_left_out": gathering.left_out,
    }


def ship(trained: Path, data: dict[str, Any], out: Path) -> None:
    """Write the parent as the package ships it: weights in bf16, and a hash of every file."""
    facts = json.loads((trained / METADATA).read_text(encoding="utf-8"))
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(trained, temporary)
    model: Any = load_model(trained)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(temporary)
    write_legacy_keys(temporary)
    facts |= {
        "losses": facts["losses"][LOSS_ROWS - 1 :: LOSS_ROWS],
        "data": data,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "versions": describe_versions(),
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(temporary.iterdir())
            if path.name != METADATA
        },
    }
    write_text_atomic(temporary / METADATA, json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    (temporary / "model.safetensors").chmod(0o644)  # save_pretrained leaves it readable to its owner alone
    temporary.rename(out)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--work", type=Path, required=True, help="folder of the training: checkpoints, fp32 weights")
    options.add_argument("--out", type=Path, default=SHIPPED, help="folder of the parent  [the package's]")
    options.add_argument("--held-out", type=Path, nargs="*", default=[], help="libraries of further Pythons")
    options.add_argument("--steps", type=int, default=RECIPE.steps, help="training steps  [%(default)s]")
    chosen = options.parse_args(arguments)
    texts, data = gather(chosen.held_out)
    print(json.dumps(data, indent=1), file=sys.stderr)
    recipe = dataclasses.replace(RECIPE, steps=chosen.steps)
    trained = train_parent(recipe, texts, chosen.work, tell)
    ship(trained.folder, data, chosen.out)
    print(f"wrote {chosen.out}: {trained}", file=sys.stderr)


def tell(stage: str, done: int, total: int, note: str = "") -> None:
    print(f"{time.strftime('%X')} {stage} {done}/{total} {note}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
