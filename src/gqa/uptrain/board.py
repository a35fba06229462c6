"""Figures of each step for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gqa.errors import GqaError


class Board:
    """Writes event files to a folder; without a folder it does nothing."""

    def __init__(self, folder: Path | None, step: int) -> None:
        """step: the last one that is done. What an interrupted run wrote after that is hidden."""
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise GqaError(
                "logging to TensorBoard needs the package tensorboard", hint="pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, **figures: float | None) -> None:
        for name, value in figures.items():
            if self._writer is not None and value is not None:
                self._writer.add_scalar(f"uptrain/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
