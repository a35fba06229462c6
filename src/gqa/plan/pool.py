"""A budget of bytes as an engine divides it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pool:
    """tokens: what the engine's log calls the size of its cache; concurrency: requests of the context that it holds at
    once, a share of the last one included; blocks: their number, and block_tokens their size, where it has blocks."""

    tokens: int
    concurrency: float
    blocks: int | None = None
    block_tokens: int | None = None
