"""Where gqa keeps what it makes once and uses again, and how a folder gets there whole."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Models that were trained or dequantised on this machine: $GQA_CACHE, else $XDG_CACHE_HOME/gqa, else
    ~/.cache/gqa."""
    if folder := os.environ.get("GQA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gqa"


def publish(finished: Path, folder: Path) -> None:
    """Rename a finished folder into its place. Another process may have been faster: its folder is the same, and
    stays."""
    try:
        os.rename(finished, folder)
    except OSError:
        if not folder.is_dir():
            raise
