"""One panel of lines as static SVG: lines named at their ends, measured marks filled, predicted ones hollow.

Colours are names of CSS variables (`var(--kv2)`), so that one drawing serves light, dark and print. Everything is
placed in fixed pixels, so that labels can be kept apart here and the page only scales the whole.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from gqa.report.axes import Axis

FONT_SIZE, LINE = 12.5, 15
MARK, MANY = 52, 12  # area of a mark, which is made smaller where there are many
FAR = 36  # pixels from which on a lead from a line to its name would disturb
TOP, BOTTOM = 30, 46  # room for the y title above the panel, ticks and x title below


@dataclasses.dataclass(frozen=True)
class Series:
    """name: written at the line's end; points: (x, y), drawn as filled marks; spreads: (x, low, high) of the measured,
    as bars or, with `band`, as one band; hollow: predicted marks; path: where the line goes if not through the points.
    """

    name: str
    color: str
    shape: str
    points: Sequence[tuple[float, float]] = ()
    spreads: Sequence[tuple[float, float, float]] = ()
    hollow: Sequence[tuple[float, float]] = ()
    path: Sequence[tuple[float, float]] = ()
    band: bool = False

    @property
    def line(self) -> Sequence[tuple[float, float]]:
        return sorted(self.path or self.points)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A horizontal reference line over the whole panel, named at its end or, if `inside`, upon its start."""

    name: str
    y: float
    color: str = "var(--ink-soft)"
    dash: tuple[int, int] = (5, 4)
    inside: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """Natural pixels of a panel: the whole width, the plot's height, room for tick labels left and names right."""

    width: int = 430
    height: int = 230
    left: int = 58
    right: int = 112


def panel(x: Axis, y: Axis, series: Sequence[Series], rules: Sequence[Rule] = (), frame: Frame | None = None) -> str:
    """The panel as an SVG element."""
    import altair as alt

    frame = frame or Frame()
    width = frame.width - frame.left - frame.right
    ends = _ends(x, y, series, rules, width, frame.height)
    layers = [_rule(alt, x, y, rule, width, frame.height) for rule in rules]
    for one in series:
        layers += _series(alt, x, y, one)
    keyed = any(end.far for end in ends)
    layers += [_name(alt, end, keyed) for end in ends]
    layers += [_inside_name(alt, y, rule, frame.height) for rule in rules if rule.inside]
    room = {"left": frame.left, "right": frame.right, "top": TOP, "bottom": BOTTOM}
    return drawing(layers, width, frame.height, room)


def drawing(layers: Sequence[Any], width: float, height: float, room: dict[str, int]) -> str:
    """Layers of altair as an SVG element that scales with its box; room: pixels around the plot."""
    import altair as alt

    chart = (
        alt.layer(*layers)
        .properties(width=width, height=height, padding=room, autosize=alt.AutoSizeParams(type="none"))
        .configure(font="sans-serif", background="transparent", aria=False)
        .configure_view(stroke=None)
    )
    stream = io.StringIO()
    chart.save(stream, format="svg", engine="vl-convert")
    svg = stream.getvalue()
    head, _, body = svg.partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    natural = box.split()[2]
    return f'<svg viewBox="{box}" style="--natural:{natural}px" aria-hidden="true" focusable="false">{body}'


def axis(alt: Any, of: Axis, **style: Any) -> Any:
    values, labels = json.dumps(list(of.ticks)), json.dumps(list(of.ticks.values()))
    return alt.Axis(
        title=of.title,
        values=list(of.ticks),
        labelExpr=f"{labels}[indexof({values}, datum.value)]",
        labelColor="var(--ink-soft)",
        titleColor="var(--ink-soft)",
        labelFontSize=FONT_SIZE - 0.5,
        titleFontSize=FONT_SIZE - 0.5,
        titleFontWeight="normal",
        labelPadding=6,
        domainColor="var(--rule)",
        gridColor="var(--grid)",
        tickColor="var(--rule)",
        labelOverlap=False,
        labelFlush=False,
        **style,
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as can be to the wanted ones, in the same order, at least `gap` apart, within [low, high].

    Neighbours that would touch are joined into a block that is centred on what its members wanted."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        centre = sum(wanted[i] for i in block) / len(block)
        length = gap * (len(block) - 1)
        return max(low, min(centre - length / 2, high - length))

    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and start(blocks[-2]) + gap * len(blocks[-2]) > start(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    places = [0.0] * len(wanted)
    for block in blocks:
        for k, i in enumerate(block):
            places[i] = start(block) + k * gap
    return places


@dataclasses.dataclass(frozen=True)
class _End:
    """A name at the right: its text, colour and mark, where its line ends and where the name lies, in pixels."""

    text: str
    color: str
    shape: str | None
    from_x: float
    from_y: float
    x: float
    y: float

    @property
    def far(self) -> bool:
        return math.hypot(self.x - self.from_x, self.y - self.from_y) > FAR


def _ends(x: Axis, y: Axis, series: Sequence[Series], rules: Sequence[Rule], width: int, height: int) -> list[_End]:
    lasts = [(s, max(s.line, key=lambda p: x.place(p[0]))) for s in series if s.line]
    ends = [(s.name, s.color, s.shape, x.place(a) * width, (1 - y.place(b)) * height) for s, (a, b) in lasts]
    ends += [(r.name, r.color, None, float(width), (1 - y.place(r.y)) * height) for r in rules if not r.inside]
    places = spread([end[-1] for end in ends], LINE, 4, height - 2)
    return [_End(*end, x=width + 16, y=place) for end, place in zip(ends, places, strict=True)]


def _encodings(alt: Any, x: Axis, y: Axis) -> dict[str, Any]:
    def scale(of: Axis) -> Any:
        more = {"base": 2} if of.kind == "log" else {}
        return alt.Scale(type=of.kind, domain=[of.low, of.high], reverse=of.reverse, nice=False, zero=False, **more)

    return {
        "x": alt.X("x:Q", scale=scale(x), axis=axis(alt, x, grid=False, titlePadding=8)),
        "y": alt.Y(
            "y:Q",
            scale=scale(y),
            axis=axis(alt, y, ticks=False, domain=False, titleAngle=0, titleAlign="left", titleX=-50, titleY=-14),
        ),
    }


def _series(alt: Any, x: Axis, y: Axis, one: Series) -> list[Any]:
    encodings = _encodings(alt, x, y)
    layers = [_data(alt, one.line).mark_line(color=one.color, strokeWidth=2, strokeJoin="round").encode(**encodings)]
    if one.spreads:
        rows = [{"x": a, "y": low, "y2": high} for a, low, high in one.spreads]
        drawn = alt.Chart(alt.Data(values=rows))
        drawn = (
            drawn.mark_area(color=one.color, opacity=0.18, strokeWidth=0)
            if one.band
            else drawn.mark_rule(color=one.color, strokeWidth=5, opacity=0.3)
        )
        layers.append(drawn.encode(**encodings, y2=alt.Y2("y2:Q")))
    for marks, fill in ((one.points, one.color), (one.hollow, "var(--paper)")):
        if marks:
            size = MARK if len(marks) <= MANY else MARK / 4
            dots = _data(alt, marks).mark_point(
                shape=one.shape, size=size, fill=fill, stroke=one.color, strokeWidth=1.6, opacity=1
            )
            layers.append(dots.encode(**encodings))
    return layers


def _rule(alt: Any, x: Axis, y: Axis, rule: Rule, width: int, height: int) -> Any:
    place = (1 - y.place(rule.y)) * height
    mark = alt.Chart(alt.Data(values=[{}])).mark_rule(color=rule.color, strokeWidth=1.2, strokeDash=list(rule.dash))
    return mark.encode(x=alt.XValue(0), x2=alt.X2Value(width), y=alt.YValue(place), y2=alt.Y2Value(place))


def _name(alt: Any, end: _End, keyed: bool) -> Any:
    """The name of a line, with a lead from the line's end, or with its mark where leads would run across the panel."""
    values = alt.Chart(alt.Data(values=[{}]))
    text = values.mark_text(align="left", baseline="middle", fontSize=FONT_SIZE, color=end.color)
    named = text.encode(x=alt.XValue(end.x), y=alt.YValue(end.y), text=alt.TextValue(end.text))
    if keyed and end.shape:
        key = values.mark_point(shape=end.shape, size=MARK, fill=end.color, stroke=end.color, opacity=1)
        return named + key.encode(x=alt.XValue(end.x - 10), y=alt.YValue(end.y))
    if abs(end.y - end.from_y) < 3 and end.x - end.from_x < 20:
        return named
    lead = values.mark_rule(color=end.color, strokeWidth=0.8, opacity=0.6)
    return named + lead.encode(
        x=alt.XValue(end.from_x + 5), y=alt.YValue(end.from_y), x2=alt.X2Value(end.x - 3), y2=alt.Y2Value(end.y)
    )


def _inside_name(alt: Any, y: Axis, rule: Rule, height: int) -> Any:
    text = alt.Chart(alt.Data(values=[{}])).mark_text(
        align="left", baseline="bottom", fontSize=FONT_SIZE - 1, color=rule.color, dx=2, dy=-2
    )
    return text.encode(x=alt.XValue(0), y=alt.YValue((1 - y.place(rule.y)) * height), text=alt.TextValue(rule.name))


def _data(alt: Any, pairs: Sequence[tuple[float, float]]) -> Any:
    return alt.Chart(alt.Data(values=[{"x": a, "y": b} for a, b in pairs]))
