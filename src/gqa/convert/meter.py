"""Tell how far the writing of files is, in MiB, and how fast."""

from __future__ import annotations

import time

from gqa.progress import Progress
from gqa.units import format_bytes

_MIB = 1 << 20


class Meter:
    """`add` tells of bytes that were written just now, `skip` of those that a former run has written."""

    def __init__(self, progress: Progress, stage: str, total_bytes: int) -> None:
        self.progress, self.stage, self.total_bytes = progress, f"{stage} (MiB)", total_bytes
        self.skipped = self.written = 0
        self.started = time.perf_counter()

    def skip(self, nbytes: int) -> None:
        self.skipped += nbytes

    def add(self, nbytes: int) -> None:
        self.written += nbytes
        rate = self.written / max(time.perf_counter() - self.started, 1e-9)
        done = self.skipped + self.written
        self.progress(self.stage, -(-done // _MIB), -(-self.total_bytes // _MIB), f"{format_bytes(rate)}/s")
