"""Which state of the sources was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(folder: Path | None = None) -> str | None:
    """The commit of a checkout, with a mark if files had changed since; None where the package is installed.

    folder: one with files of the checkout, by default that of this file. An installed package may lie inside another
    project's checkout, whose commit says nothing, so the folder must hold files that git tracks.
    """
    folder = folder or Path(__file__).parent
    try:
        if not _git(folder, "ls-files", "."):
            return None
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()
