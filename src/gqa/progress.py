"""How long work tells how far it is: one callable, handed down from whoever can show it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `stage` are finished; `note` is a short figure for the reader."""
        ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Shows nothing."""
