"""A study's record as the page reads it: checked once at this edge, gaps allowed, every look-up by name.

Letters: `kv_heads` is a stop of the dial; the parent is the model before conversion.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report.alternatives import View

Row = Mapping[str, Any]

STAGES = ("converted", "uptrained")
METHODS = ("mean", "svd", "svd+refine", "svd+distill")
_TABLES = ("settings", "quality", "layers", "decode", "capacity")


@dataclasses.dataclass(frozen=True)
class Study:
    """The record of `gqa study`, its tables as rows; a table that was not measured is empty."""

    record: Record
    parent: Row
    control: Row
    settings: tuple[Row, ...]
    quality: tuple[Row, ...]
    layers: tuple[Row, ...]
    decode: tuple[Row, ...]
    capacity: tuple[Row, ...]

    @classmethod
    def from_record(cls, record: Record) -> Study:
        """Errors: GqaError when the record is not a study's or holds no setting of the dial."""
        if record.command != "study":
            raise GqaError(
                "the report is made from a study's record",
                got=f"a record of `gqa {record.command}`",
                allowed="records of gqa study, of gqa plan, and of the benchmarks of uptraining, scaling and quality"
                " on a real model",
            )
        results = record.results
        if not isinstance(results, Mapping):
            raise GqaError("a study's record without results", got=type(results).__name__)
        parent, control = results.get("parent"), results.get("control")
        if not isinstance(parent, Mapping) or not _whole(parent.get("query_heads")):
            raise GqaError("a study's record without its parent model", hint="run gqa study again")
        tables = {name: _rows(results.get(name), name) for name in _TABLES}
        tables["settings"] = tuple(sorted(tables["settings"], key=lambda row: -row["kv_heads"]))
        if not tables["settings"]:
            raise GqaError("a study's record without any setting of KV heads", hint="run gqa study again")
        strange = [row["kv_heads"] for row in tables["settings"] if parent["query_heads"] % row["kv_heads"]]
        if strange:
            raise GqaError(f"{strange[0]} KV heads do not divide the {parent['query_heads']} query heads of the record")
        return cls(record, parent, control if isinstance(control, Mapping) else {}, **tables)

    @functools.cached_property
    def view(self) -> View | None:
        """What a plan of the model says under other devices, dtypes and contexts; None in a record without it."""
        plan = self.record.results.get("plan")
        if not isinstance(plan, Mapping) or not isinstance(plan.get("what_if"), Mapping):
            return None
        told = [row["kv_heads"] for row in plan["settings"]]
        if told != self.stops:
            raise GqaError("the record's plan has other settings than its study", got=told, allowed=self.stops)
        return View(Record("plan", plan["inputs"], plan, {}), range(len(told)))

    @property
    def name(self) -> str:
        return str(self.parent.get("name") or "an unnamed model")

    @property
    def stops(self) -> list[int]:
        """The dial's stops, from most KV heads to fewest."""
        return [row["kv_heads"] for row in self.settings]

    @property
    def query_heads(self) -> int:
        return self.parent["query_heads"]

    @property
    def full(self) -> int:
        """KV heads of the parent: the stop where nothing is saved."""
        return self.parent["kv_heads"] if _whole(self.parent.get("kv_heads")) else self.stops[0]

    @property
    def methods(self) -> list[str]:
        """Conversion methods in the record, the known ones first and in order of strength."""
        found = {str(row.get("method")) for row in (*self.quality, *self.layers)} - {"parent"}
        return [m for m in METHODS if m in found] + sorted(found - set(METHODS))

    def setting(self, kv_heads: int) -> Row:
        return next(row for row in self.settings if row["kv_heads"] == kv_heads)

    def figure(self, kv_heads: int, method: str, stage: str, name: str) -> float | None:
        """One figure of the quality table, None where it was not measured."""
        for row in self.quality:
            if (row["kv_heads"], row.get("method"), row.get("stage")) == (kv_heads, method, stage):
                return positive(row, name) if name == "perplexity" else number(row, name)
        return None

    def best(self, kv_heads: int, stages: Sequence[str] = STAGES) -> tuple[float, str, str] | None:
        """The lowest perplexity at a stop with the method and stage that gave it."""
        found = [
            (perplexity, method, stage)
            for stage in stages
            for method in self.methods
            if (perplexity := self.figure(kv_heads, method, stage, "perplexity")) is not None
        ]
        return min(found, default=None)

    def decode_rows(self, kv_heads: int) -> list[Row]:
        """Decode measurements of one stop, by rising context."""
        rows = [row for row in self.decode if row["kv_heads"] == kv_heads and _whole(row.get("context_tokens"))]
        return sorted(rows, key=lambda row: row["context_tokens"])

    @property
    def longest_context(self) -> int | None:
        """The longest context at which every stop that was timed has a decode time."""
        timed = [{row["context_tokens"] for row in rows} for n in self.stops if (rows := self.decode_rows(n))]
        return max(set.intersection(*timed), default=None) if timed else None

    def decode_seconds(self, kv_heads: int) -> float | None:
        """Median decode time per token at the longest common context."""
        rows = [row for row in self.decode_rows(kv_heads) if row["context_tokens"] == self.longest_context]
        return positive(rows[0], "seconds_per_token_p50") if rows else None

    @property
    def devices(self) -> dict[str, float]:
        """Device -> memory in bytes, smallest first."""
        found = {str(row.get("device")): positive(row, "memory_bytes") for row in self.capacity}
        known = {device: memory for device, memory in found.items() if memory is not None}
        return dict(sorted(known.items(), key=lambda item: item[1]))

    def capacity_row(self, kv_heads: int, device: str) -> Row:
        rows = (row for row in self.capacity if row["kv_heads"] == kv_heads and str(row.get("device")) == device)
        return next(rows, {})

    def basis(self, name: str) -> str | None:
        """`measured` or `predicted` for a figure, None where the record does not say."""
        found = self.record.basis.get(name) if isinstance(self.record.basis, Mapping) else None
        return found if found in ("measured", "predicted") else None

    def groupings(self, kv_heads: int) -> dict[int, list[int]]:
        """Layer -> for each query head the KV head that it reads, where the record tells the layer's groups.

        The record lists which of the parent's KV heads share; the last method that has groups speaks."""
        found = {}
        for method in self.methods:
            for row in self.layers:
                if (row["kv_heads"], row.get("method")) == (kv_heads, method) and _whole(row.get("layer"), least=0):
                    reads = self._reads(row.get("groups"), kv_heads)
                    if reads:
                        found[row["layer"]] = reads
        return dict(sorted(found.items()))

    def contiguous(self, kv_heads: int) -> list[int]:
        """The published grouping: query head n reads KV head n // G."""
        return [n * kv_heads // self.query_heads for n in range(self.query_heads)]

    def _reads(self, groups: Any, kv_heads: int) -> list[int] | None:
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            return None
        owner = {head: index for index, group in enumerate(groups) for head in group if _whole(head, least=0)}
        if len(groups) != kv_heads or sorted(owner) != list(range(self.full)):
            return None
        return [owner[n * self.full // self.query_heads] for n in range(self.query_heads)]


def number(row: Row, name: str) -> float | None:
    """A finite figure of a row, None where it is missing or no number."""
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def positive(row: Row, name: str) -> float | None:
    """A figure above zero, which a log axis has a place for; None for any other."""
    value = number(row, name)
    return value if value is not None and value > 0 else None


def points(rows: Sequence[Row], x: str, y: str) -> Iterator[tuple[float, float]]:
    """The (x, y) pairs of rows that have both and can stand on a log axis, which has no place for y of zero or less."""
    for row in rows:
        a, b = number(row, x), positive(row, y)
        if a is not None and b is not None:
            yield a, b


def _rows(table: Any, name: str) -> tuple[Row, ...]:
    if table is None:
        return ()
    if not isinstance(table, list | tuple) or not all(isinstance(row, Mapping) for row in table):
        raise GqaError(f"the record's table `{name}` is not a list of rows", got=type(table).__name__)
    if not all(_whole(row.get("kv_heads")) for row in table):
        raise GqaError(f"a row of the record's table `{name}` does not say its KV heads")
    return tuple(table)


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
