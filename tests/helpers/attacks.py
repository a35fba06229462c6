"""What every attack on a conversion is held against: one clear error, nothing written, the source as it was."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from helpers.checkpoints import random_windows

from gqa.convert.recipe import Recipe, make_recipe
from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint

MEAN = make_recipe(2, "mean")
CALIBRATED = make_recipe(2, calibration_tokens=64, window=32)

Damage = Callable[[Path], Any]


def everything(folder: Path) -> dict[str, tuple]:
    """Each name under a folder -> what lies there: bytes, where a link leads, times of change. Opens no pipe."""
    found: dict[str, tuple] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        what = str(stat.S_IFMT(status.st_mode))
        if path.is_symlink():
            what = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = (what, status.st_mtime_ns, status.st_mode)
    return found


def refused(
    folder: Path,
    out: Path,
    said: str,
    recipe: Recipe = MEAN,
    windows: np.ndarray | Literal["random"] | None = "random",
) -> GqaError:
    """Convert, and see one error that says so in full, while everything around is left as it was."""
    place = folder.parent
    before = everything(place)
    with pytest.raises(GqaError, match=said) as caught:
        convert(
            open_checkpoint(str(folder)), out, recipe, random_windows(recipe) if isinstance(windows, str) else windows
        )
    assert everything(place) == before
    assert complete(caught.value)
    return caught.value


def complete(error: GqaError) -> bool:
    """It names what is wrong and what was met or would be right, in words that a terminal can print."""
    text = str(error)
    return bool(error.what and (error.got or error.allowed)) and text.replace("\n", "").isprintable()
