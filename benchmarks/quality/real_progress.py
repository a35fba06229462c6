"""Progress of the proof on a real model. Nothing heavy is imported: `real_make.py` measures its memory."""

from __future__ import annotations

import sys

_last_shown: list[tuple[str, int]] = [("", -1)]


def show(stage: str, done: int, total: int, note: str = "") -> None:
    """Progress on stderr, about ten lines per stage; a change of the note alone is no new line."""
    if (stage, done) != _last_shown[0] and (done == total or done % max(1, total // 10) == 0):
        _last_shown[0] = stage, done
        print(f"{stage} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)
