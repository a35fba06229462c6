"""One panel of dots in rows as static SVG: before (hollow) and after (filled), each with its range; rows are named left
and valued right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gqa.report.axes import Axis
from gqa.report.chart import BOTTOM, FONT_SIZE, MARK, axis, drawing

STEP = 26
WIDTH, LEFT, RIGHT = 430, 94, 122

Range = tuple[float, float, float]  # mean, lowest, highest


@dataclasses.dataclass(frozen=True)
class Dot:
    name: str
    before: Range | None
    after: Range | None
    text: str
    color: str
    shape: str


def dots(x: Axis, rows: Sequence[Dot], rules: Sequence[float] = ()) -> str:
    """The panel as an SVG element; rules: values of x with a dashed line from top to bottom."""
    import altair

    alt: Any = altair  # its types know only values written out
    width, height = WIDTH - LEFT - RIGHT, STEP * len(rows)
    scale = alt.Scale(
        type=x.kind,  # pyright: ignore[reportArgumentType]
        domain=[x.low, x.high],
        nice=False,
        zero=False,
    )
    across = alt.X("x:Q", scale=scale, axis=axis(alt, x, domain=False, ticks=False, titlePadding=8))
    layers = []
    for value in rules:
        line = alt.Chart(alt.Data(values=[{"x": value}])).mark_rule(color="var(--ink-soft)", strokeDash=[5, 4])
        layers.append(line.encode(x=across, y=alt.YValue(0), y2=alt.Y2Value(height)))
    for place, row in enumerate(rows):
        y = alt.YValue(STEP * (place + 0.5))
        for of, fill in ((row.before, "var(--paper)"), (row.after, row.color)):
            if of is None:
                continue
            data = alt.Chart(alt.Data(values=[dict(zip(("x", "low", "high"), of, strict=True))]))
            span = data.mark_rule(color=row.color, strokeWidth=5, opacity=0.3)
            layers.append(span.encode(x=alt.X("low:Q", scale=scale), x2=alt.X2("high:Q"), y=y))
            mark = data.mark_point(shape=row.shape, size=MARK, fill=fill, stroke=row.color, strokeWidth=1.6, opacity=1)
            layers.append(mark.encode(x=across, y=y))
        for text, at, align in ((row.name, -10, "right"), (row.text, width + 10, "left")):
            said = alt.Chart(alt.Data(values=[{}])).mark_text(
                align=align,  # pyright: ignore[reportArgumentType]
                baseline="middle",
                fontSize=FONT_SIZE,
                color=row.color,
            )
            layers.append(said.encode(x=alt.XValue(at), y=y, text=alt.TextValue(text)))
    return drawing(layers, width, height, {"left": LEFT, "right": RIGHT, "top": 8, "bottom": BOTTOM})
