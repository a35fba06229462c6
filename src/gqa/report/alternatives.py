"""What a reader may choose on a page: device, cache dtype and context. Everything that the choice changes is made
ready here, as texts, shares and places, so that the script only shows it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from html import escape
from typing import Any

from gqa.record import Record
from gqa.report import forms
from gqa.report.controls import select
from gqa.units import format_bytes, format_seconds

LEVELS = 7  # shades of the heat map
PARTS = (("projection", "projections q, k, v, o"), ("core", "attention core"), ("rest", "MLPs and output"))
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class View:
    """The alternatives of a plan's record, for the settings of those numbers."""

    record: Record
    stops: Sequence[int]

    @property
    def _what_if(self) -> Mapping[str, Any]:
        return self.record.results["what_if"]

    @property
    def devices(self) -> list[str]:
        return [row["device"] for row in self._what_if["devices"]]

    @property
    def dtypes(self) -> list[str]:
        return list(self._what_if["kv_dtypes"])

    @property
    def contexts(self) -> list[int]:
        return list(self._what_if["contexts"])

    @property
    def heads(self) -> list[int]:
        return [self.record.results["settings"][index]["kv_heads"] for index in self.stops]

    @cached_property
    def _rows(self) -> dict[tuple[int, str, str, int], Mapping[str, Any]]:
        rows = self._what_if["settings"]
        return {(row["stop"], row["device"], row["kv_dtype"], row["context_tokens"]): row for row in rows}

    @cached_property
    def _caches(self) -> dict[tuple[int, str, int], Mapping[str, Any]]:
        return {(row["stop"], row["kv_dtype"], row["context_tokens"]): row for row in self._what_if["caches"]}

    @cached_property
    def _work(self) -> dict[tuple[int, int], Mapping[str, Any]]:
        return {(row["stop"], row["context_tokens"]): row for row in self._what_if["work"]}

    def by(self, place: int) -> dict[str, dict[str, Any]]:
        """For the stop at that place, what the dial shows under each choice `device|dtype|context`."""
        return {
            f"{device}|{dtype}|{context}": self._fields(place, device, dtype, context)
            for device in self.devices
            for dtype in self.dtypes
            for context in self.contexts
        }

    def _fields(self, place: int, device: str, dtype: str, context: int) -> dict[str, Any]:
        index, most = self.stops[place], self.stops[0]
        cache, full = self._caches[index, dtype, context], self._caches[most, dtype, context]
        row, slowest = self._rows[index, device, dtype, context], self._rows[most, device, dtype, context]
        seconds, requests = row["decode_seconds_bound"], row["max_concurrent_requests"]
        count = self.record.inputs["batch"]
        each = "one request" if count == 1 else f"{count:,} requests"
        return {
            "cache": format_bytes(cache["kv_bytes_per_token"]),
            "cache_note": f"{format_bytes(cache['kv_bytes'])} for {each} of {forms.tokens(context)} tokens",
            "cache_share": cache["kv_bytes"] / full["kv_bytes"],
            "requests": UNKNOWN if requests is None else f"{requests:,}",
            "requests_note": f"of {forms.tokens(context)} tokens, beside the weights on one {device}",
            "bound": UNKNOWN if seconds is None else format_seconds(seconds),
            "bound_note": "" if seconds is None else f"held by {row['decode_limit']}, for {each}",
            "bound_share": None if seconds is None else seconds / slowest["decode_seconds_bound"],
            "roof": self._point(row),
        }

    def data(self) -> dict[str, Any]:
        """Of the charts: heat (dtype -> stop -> context -> [text, level]), fits (choice -> stop -> context), work
        (context -> stop -> texts and shares), roofs (device -> line)."""
        count = self.record.inputs["batch"]
        return {
            "heat": {dtype: self._heat(dtype) for dtype in self.dtypes},
            "fits": {
                f"{device}|{dtype}": [
                    [self._fits(index, device, dtype, context, count) for context in self.contexts]
                    for index in self.stops
                ]
                for device in self.devices
                for dtype in self.dtypes
            },
            "work": {str(context): self._shares(context) for context in self.contexts},
            "roofs": {row["device"]: self._roof(row) for row in self._what_if["devices"]} if self.bounded else {},
            "axes": self._axes() if self.bounded else {},
        }

    def _fits(self, index: int, device: str, dtype: str, context: int, count: int) -> bool | None:
        requests = self._rows[index, device, dtype, context]["max_concurrent_requests"]
        return None if requests is None else requests >= count

    def _heat(self, dtype: str) -> list[list[list[Any]]]:
        sizes = [row["kv_bytes"] for row in self._caches.values()]
        low, high = math.log(min(sizes)), math.log(max(sizes))
        return [
            [
                [
                    format_bytes(size := self._caches[index, dtype, context]["kv_bytes"]),
                    round((math.log(size) - low) / ((high - low) or 1) * (LEVELS - 1)),
                ]
                for context in self.contexts
            ]
            for index in self.stops
        ]

    def _shares(self, context: int) -> list[dict[str, Any]]:
        """Per stop and step: its FLOPs as a text, and the widths of its parts in the widest stop's."""
        found = []
        for index in self.stops:
            row = self._work.get((index, context))
            if row is None:
                return []
            steps = {}
            for step in ("decode", "prefill"):
                widest = max(
                    sum(self._work[other, context][f"{step}_{part}_flops"] for part, _ in PARTS) for other in self.stops
                )
                parts = [row[f"{step}_{part}_flops"] for part, _ in PARTS]
                steps[step] = {
                    "shares": [round(part / widest, 4) for part in parts],
                    "text": f"{_flops(sum(parts))}, core {parts[1] / sum(parts):.0%}",
                }
            found.append(steps)
        return found

    # The roofline: work per byte across, work per second up, both in powers of ten.

    @property
    def bounded(self) -> bool:
        return all(row["decode_flops_per_byte"] is not None for row in self._what_if["settings"])

    @cached_property
    def _range(self) -> tuple[float, float, float, float]:
        across = [row["decode_flops_per_byte"] for row in self._what_if["settings"]]
        ridges = [row["flops_per_second"] / row["bandwidth_bytes_per_second"] for row in self._devices_told]
        up = [row["decode_flops_per_second_bound"] for row in self._what_if["settings"]]
        tops = [row["flops_per_second"] for row in self._devices_told]
        low_x, high_x = min(across) / 1.6, max([*across, *ridges]) * 3
        return low_x, high_x, min(up) / 2, max([*up, *tops]) * 1.6

    @property
    def _devices_told(self) -> list[Mapping[str, Any]]:
        rows = self._what_if["devices"]
        return [row for row in rows if row["flops_per_second"] and math.isfinite(row["flops_per_second"])]

    def _place(self, across: float, up: float) -> list[float]:
        low_x, high_x, low_y, high_y = self._range
        return [
            round(math.log(across / low_x) / math.log(high_x / low_x), 4),
            round(math.log(up / low_y) / math.log(high_y / low_y), 4),
        ]

    def _point(self, row: Mapping[str, Any]) -> list[float] | None:
        if not self.bounded:
            return None
        return self._place(row["decode_flops_per_byte"], row["decode_flops_per_second_bound"])

    def _roof(self, device: Mapping[str, Any]) -> list[list[float]]:
        low_x, high_x, *_ = self._range
        rate, peak = device["bandwidth_bytes_per_second"], device["flops_per_second"]
        if not peak or not math.isfinite(peak):
            return [self._place(low_x, low_x * rate), self._place(high_x, high_x * rate)]
        ridge = peak / rate
        return [self._place(low_x, low_x * rate), self._place(ridge, peak), self._place(high_x, peak)]

    def _axes(self) -> dict[str, list[list[Any]]]:
        low_x, high_x, low_y, high_y = self._range
        across = [10.0**n for n in range(-3, 8) if low_x <= 10.0**n <= high_x]
        up = [10.0**n for n in range(6, 18) if low_y <= 10.0**n <= high_y]
        return {
            "x": [[self._place(n, low_y)[0], f"{n:g}"] for n in across],
            "y": [[self._place(low_x, n)[1], _rate(n)] for n in up],
        }


def choices(view: View) -> str:
    """The selects of device, dtype and context."""
    asked = str(view.record.inputs["context"])
    contexts = {str(n): f"{forms.tokens(n)} tokens" for n in view.contexts}
    chosen = [
        ("on", select("device", "device", {name: name for name in view.devices}, choice=True)),
        ("cache in", select("dtype", "dtype of the cache", {name: name for name in view.dtypes}, choice=True)),
        ("context", select("context", "context", contexts, choice=True, chosen=asked)),
    ]
    return "".join(f"<label>{text} {control}</label>" for text, control in chosen)


def html(view: View) -> str:
    """The charts that follow the dial and its choices, filled by the script; each with its table."""
    head = "".join(f'<th scope="col">{forms.tokens(n)}</th>' for n in view.contexts)
    rows = "".join(
        f'<tr><th scope="row">{forms.heads(n)}</th>{"<td></td>" * len(view.contexts)}</tr>\n' for n in view.heads
    )
    heat = (
        '<figure id="heat"><figcaption><h3>Cache by KV heads and context</h3>\n<p>Bytes that the requests keep. Hatched'
        ' cells do not fit beside the weights on the device that is chosen above: <span id="heat-device"></span>.</p>'
        '</figcaption>\n<div class="scroll" tabindex="0" role="region" aria-label="Cache by KV heads and context">'
        f'<table class="heat"><thead><tr><th scope="col">context, tokens</th>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div></figure>\n"
    )
    legend = "".join(f'<span><i class="part{k}"></i>{escape(text)}</span>' for k, (_, text) in enumerate(PARTS))
    parts = "".join(f'<i class="part{k}"></i>' for k in range(len(PARTS)))
    bars = "".join(
        f"<h4>{title}</h4>"
        + "".join(
            f'<div class="flops" data-step="{step}" data-stop="{place}"><span class="who">{n}</span>'
            f'<span class="track">{parts}</span><span class="what"></span></div>\n'
            for place, n in enumerate(view.heads)
        )
        for step, title in (("decode", "One token for each request"), ("prefill", "The prompts"))
    )
    work = (
        '<figure id="work"><figcaption><h3>The dial turns the projections, never the attention core</h3>\n<p>FLOPs of a'
        ' step by KV heads, at the context that is chosen above: <span id="work-context"></span>. The longer the'
        f' context, the less the difference counts.</p></figcaption>\n<p class="legend">{legend}</p>{bars}</figure>\n'
    )
    roof = (
        '<figure id="roofline"><figcaption><h3>Where a decode step lies under the roof</h3>\n<p>FLOPs per byte that is'
        " moved, and the most FLOPs per second that the chosen device can reach at that. The slope is its memory's"
        " bandwidth, the flat part its peak. Fewer KV heads move a step to the right: the same work on fewer bytes."
        '</p></figcaption>\n<div class="panels"><svg id="roof" role="img"></svg></div>\n'
        '<details><summary>The data as a table</summary><div class="scroll" tabindex="0" role="region"'
        ' aria-label="Decode steps at the choice made"><table id="roof-table"><thead><tr><th scope="col">KV heads</th>'
        '<th scope="col">decode step at best</th><th scope="col">held by</th></tr></thead><tbody>'
        + "".join(f'<tr><th scope="row">{n}</th><td></td><td></td></tr>' for n in view.heads)
        + "</tbody></table></div></details></figure>\n"
    )
    shown = [heat, *([roof] if view.bounded else []), *([work] if view._what_if["work"] else [])]
    return f'<section id="follow">\n<h2>At the choice made above</h2>\n{"".join(shown)}</section>\n'


def _flops(count: float) -> str:
    """FLOPs as a reader keeps them: 270 GFLOP."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"


def _rate(rate: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if rate >= size:
            return f"{rate / size:g} {unit}FLOP/s"
    return f"{rate / 1e6:g} MFLOP/s"
