"""A GPU kernel with all that a call of it needs, as data: to be run, or to be compiled and looked at without a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """`kernel` over a grid of programs.

    arguments: every parameter of the kernel by name: tensors, numbers, compile-time constants, and None for what the
               call does without
    warps:     of 32 threads, per program
    stages:    how many blocks of keys are on their way at once
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the arguments. Sums of products round once, which Triton asks to be said."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)
