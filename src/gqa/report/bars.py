"""One panel of horizontal bars in groups as static SVG, each bar named and valued at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from gqa.report.axes import Axis
from gqa.report.chart import BOTTOM, FONT_SIZE, axis, drawing

THICK, STEP, GAP = 11, 17, 14
WIDTH, LEFT, RIGHT = 430, 94, 112


@dataclasses.dataclass(frozen=True)
class Bar:
    name: str
    value: float
    text: str
    color: str


def bars(x: Axis, groups: Mapping[str, Sequence[Bar]]) -> str:
    """The panel as an SVG element: per group its name at the left and its bars from zero."""
    import altair as alt

    width = WIDTH - LEFT - RIGHT
    scale = alt.Scale(domain=[x.low, x.high], nice=False)
    across = alt.X("value:Q", scale=scale, axis=axis(alt, x, domain=False, ticks=False, titlePadding=8))
    layers = []
    top = 0.0
    for name, rows in groups.items():
        middle = top + (len(rows) - 1) * STEP / 2 + THICK / 2
        layers.append(_text(alt, name, -10, middle, "var(--ink)", "right"))
        for bar in rows:
            place = top + THICK / 2
            data = alt.Chart(alt.Data(values=[{"value": bar.value, "zero": 0}]))
            drawn = data.mark_bar(size=THICK, color=bar.color, cornerRadiusEnd=2)
            layers.append(drawn.encode(x=across, x2=alt.X2("zero:Q"), y=alt.YValue(place)))
            end = x.place(max(bar.value, 0.0)) * width
            layers.append(_text(alt, f"{bar.name} {bar.text}", end + 6, place, bar.color, "left"))
            top += STEP
        top += GAP
    height = top - GAP - STEP + THICK + 6
    return drawing(layers, width, height, {"left": LEFT, "right": RIGHT, "top": 8, "bottom": BOTTOM})


def _text(alt, text: str, x: float, y: float, color: str, align: str):
    mark = alt.Chart(alt.Data(values=[{}])).mark_text(align=align, baseline="middle", fontSize=FONT_SIZE, color=color)
    return mark.encode(x=alt.XValue(x), y=alt.YValue(y), text=alt.TextValue(text))
