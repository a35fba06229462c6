"""The goals of attention on a GPU, and what the rows of a record say of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gqa.bench.kernels import OURS

BACKENDS = ("torch flash", "torch cuDNN")
FLASH = "torch flash"  # FlashAttention 2 inside torch
OF_OWN = ("gqa, paged", "gqa in bf16")

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """found: the figure that decides; met: None where no row tells."""

    text: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {None: "not measured", True: "yes", False: "no"}[self.met]


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Each goal with the least favourable of its rows. A row of ours that is wrong or failed meets nothing."""
    bf16 = [row for row in rows if row["dtype"] == "bf16"]
    decode = [row for row in bf16 if row["query_tokens"] == 1]
    usual = [row for row in decode if (row["query_heads"], row["kv_heads"]) in ((64, 8), (32, 8))]
    usual = [row for row in usual if row["head_dim"] == 128]
    prompts = [row for row in bf16 if row["query_tokens"] > 1]
    full = [row for row in usual if row["batch"] == 32 and row["context_tokens"] >= 8192]
    alone = [row for row in usual if row["batch"] == 1 and row["context_tokens"] == 32768]
    narrow = [row for row in prompts if row["query_heads"] == 32]
    return [
        _least("decode, batch 32, S 8k and up: of the datasheet's bandwidth", 0.88, _shares(full)),
        _least("decode, batch 1, S 32k: the best peer's time over ours", 1 / 1.1, _multiples(alone, _is_peer)),
        _least("decode, every shape: the best torch backend's time over ours", 1.0, _multiples(decode, _is_backend)),
        _least("the dial: time of 32 over time of 8 KV heads", 3.5, _dial(decode)),
        _least("forward, 32/8: torch flash's time over ours", 1.0, _multiples(_passes(narrow, False), _is_flash)),
        _least(
            "forward and backward, 32/8: torch flash's time over ours",
            1.0,
            _multiples(_passes(narrow, True), _is_flash),
        ),
        _most("backward, 64/8: our memory beside the gradients over torch flash's", 0.5, _memory(prompts)),
    ]


def _least(text: str, bound: float, values: Iterable[float]) -> Goal:
    worst = min(values, default=None)
    found = "-" if worst is None else f"{worst:.2f}"
    return Goal(f"{text}, at least {bound:.2f}", found, None if worst is None else worst >= bound)


def _most(text: str, bound: float, values: Iterable[float]) -> Goal:
    worst = max(values, default=None)
    found = "-" if worst is None else f"{worst:.2f}"
    return Goal(f"{text}, at most {bound:.2f}", found, None if worst is None else worst <= bound)


def _is_backend(row: Row) -> bool:
    return row["contender"] in BACKENDS


def _is_flash(row: Row) -> bool:
    return row["contender"] == FLASH


def _is_peer(row: Row) -> bool:
    return row["contender"] not in (OURS, *OF_OWN)


def _passes(rows: Iterable[Row], backward: bool) -> list[Row]:
    return [row for row in rows if row["backward"] == backward]


def _shares(rows: Iterable[Row]) -> list[float]:
    """Of the datasheet's bandwidth; none where there is no datasheet of the GPU."""
    ours = [row for row in rows if row["contender"] == OURS]
    missed = [0.0 for row in ours if row["status"] != "timed"]
    return missed + [row["fraction_of_datasheet"] for row in ours if "fraction_of_datasheet" in row]


def _multiples(rows: Iterable[Row], counts: Callable[[Row], bool]) -> list[float]:
    """Of each problem the least time of the rows that count over ours; 0 where ours has none and theirs does."""
    best: dict[tuple, float] = {}
    for row in rows:
        if counts(row) and row["status"] == "timed":
            ratio = row["times_of_gqa"] or 0.0
            best[_key(row)] = min(ratio, best.get(_key(row), ratio))
    return list(best.values())


def _key(row: Row) -> tuple:
    names = ("query_heads", "kv_heads", "head_dim", "context_tokens", "batch", "query_tokens", "backward")
    return tuple(row[name] for name in names)


def _dial(rows: Iterable[Row]) -> list[float]:
    times = {
        row["kv_heads"]: row["seconds_p50"]
        for row in rows
        if row["contender"] == OURS
        and row["status"] == "timed"
        and (row["query_heads"], row["batch"], row["context_tokens"]) == (32, 16, 32768)
    }
    return [times[32] / times[8]] if {32, 8} <= set(times) else []


def _memory(prompts: Iterable[Row]) -> list[float]:
    """Ours over theirs, per problem with 64 query heads."""
    told: dict[tuple, dict[str, float]] = {}
    for row in prompts:
        if row["query_heads"] == 64 and "backward_extra_bytes" in row:
            told.setdefault(_key(row), {})[row["contender"]] = row["backward_extra_bytes"]
    both = [found for found in told.values() if {OURS, FLASH} <= set(found)]
    return [found[OURS] / found[FLASH] for found in both if found[FLASH] > 0]
