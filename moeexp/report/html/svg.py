"""Charts as HTML rows of inline SVG. Geometry is in percent of the width, text is HTML beside it, so that a chart is as
readable on a phone as on a desk. Geometry is computed here; templates/rows.html and scatter.html write it.

A row or point carries `data-run`, by which the page's filter shows and hides it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from moeexp.report.html.template import render

BINS = 72
MARGIN = 0.15  # of a curve's width beside its first and last point, for their text
LABEL = 5  # percent of a plot's height that a line of text takes


@dataclass(frozen=True)
class Bar:
    """A part of a row, from `start` to `end` in the chart's unit; `kind` is its CSS class, `hint` shows on hover."""

    start: float
    end: float
    kind: str
    hint: str = ""


@dataclass(frozen=True)
class BarRow:
    label: str
    value: str
    bars: Sequence[Bar] = ()
    note: str = ""
    run: str | None = None
    samples: Sequence[float] = field(default=())
    marks: Sequence[tuple[float, str]] = ()  # (place, hint) of a vertical line


@dataclass(frozen=True)
class Scale:
    """Maps values to percent of the width; `log` needs low > 0."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        return round(min(max(100 * (at - low) / (high - low), 0.0), 100.0), 3) if high > low else 50.0

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers within the range."""
        if self.log:
            return self._log_ticks(wanted)
        if self.high <= self.low:
            return [self.low]
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        """Powers of ten where there are enough of them, else of each decade the first set that gives three."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for mantissas in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [m / 10 for m in range(10, 100)]):
            ticks = [float(f"{m * 10.0**d:.6g}") for d in decades for m in mantissas]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / (wanted + 2))]
        return [self.low, self.high]


@dataclass(frozen=True)
class Mark:
    """An element of SVG with its text, and what shows on hover."""

    tag: str
    attributes: dict[str, Any]
    text: str = ""
    hint: str = ""


def rows(items: Sequence[BarRow], scale: Scale, unit: str, *, zero: float | None = None) -> Markup:
    """Horizontal bars, intervals or histograms, one row each, over a common axis."""
    drawn = [(item, _row(item, scale, zero)) for item in items]
    return render("rows", rows=drawn, axis=[_tick(scale(tick), tick) for tick in scale.ticks()], unit=unit)


def _row(item: BarRow, scale: Scale, zero: float | None) -> list[Mark]:
    drawn = [_line(scale(tick), "grid") for tick in scale.ticks()]
    if zero is not None:
        drawn.append(_line(scale(zero), "zero"))
    drawn += _histogram(item.samples, scale) + [_bar(bar, scale) for bar in item.bars]
    return drawn + [_line(scale(place), "mark", hint) for place, hint in item.marks]


def _bar(bar: Bar, scale: Scale) -> Mark:
    left, right = sorted((scale(bar.start), scale(bar.end)))
    if bar.kind == "dot":
        return Mark("circle", {"class": "dot", "cx": f"{left}%", "cy": "50%", "r": 5}, hint=bar.hint)
    if bar.kind == "range":
        ends = {"x1": f"{left}%", "x2": f"{right}%", "y1": "50%", "y2": "50%"}
        return Mark("line", {"class": "range"} | ends, hint=bar.hint)
    # A bar that is there is seen: at least a hair's width.
    width = max(round(right - left, 3), 0.3)
    place: dict[str, Any] = {"x": f"{left}%", "y": "18%", "width": f"{width}%", "height": "64%", "rx": 2}
    return Mark("rect", {"class": bar.kind} | place, hint=bar.hint)


def _histogram(samples: Sequence[float], scale: Scale) -> list[Mark]:
    if not len(samples):
        return []
    places = [scale(sample) for sample in samples]
    counts, edges = np.histogram(places, bins=BINS, range=(0, 100))
    most, width = counts.max(), 100 / BINS
    return [
        Mark(
            "rect",
            {
                "class": "bin",
                "x": f"{left:.2f}%",
                "y": f"{100 - 92 * count / most:.1f}%",
                "width": f"{width:.2f}%",
                "height": f"{92 * count / most:.1f}%",
            },
        )  # fmt: skip
        for count, left in zip(counts, edges, strict=False)
        if count
    ]


def _line(at: float, kind: str, hint: str = "") -> Mark:
    return Mark("line", {"class": kind, "x1": f"{at}%", "x2": f"{at}%", "y1": 0, "y2": "100%"}, hint=hint)


def _tick(at: float, value: float) -> Mark:
    anchor = "start" if at < 4 else "end" if at > 96 else "middle"
    return Mark("text", {"x": f"{at}%", "y": 14, "text-anchor": anchor}, short(value))


def short(value: float) -> str:
    """1,200 as 1.2k: an axis has little room."""
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:g}{suffix}"
    return f"{value:g}"


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    text: str
    hint: str
    run: str


def scatter(points: Sequence[Point], roofs: Sequence[tuple[float, str]], *, x_unit: str, y_unit: str, roof_y: float) -> Markup:
    """Points on log-log axes under roofs y = c / x; `roofs`: (c, name). `roof_y`: the highest y that the plot needs."""
    x = Scale(min(p.x for p in points) / 2, max(p.x for p in points) * 2, log=True)
    y = Scale(min(p.y for p in points) / 2, max(roof_y, max(p.y for p in points) * 2), log=True)
    shapes = [_line(x(tick), "grid") for tick in x.ticks()]
    shapes += _levels(y, y.ticks())
    for c, name in roofs:
        # Both ends within the plot: the roof leaves it at the top or at a side.
        left, right = max(x.low, c / y.high), min(x.high, c / y.low)
        if left < right:
            place = {"x1": f"{x(left)}%", "y1": f"{100 - y(c / left)}%", "x2": f"{x(right)}%", "y2": f"{100 - y(c / right)}%"}
            shapes.append(Mark("line", {"class": "roof"} | place, hint=name))
    axis = [_tick(x(tick), tick) for tick in x.ticks()]
    return render("scatter", shapes=shapes, points=_named(points, x, y), axis=axis, x_unit=x_unit, y_unit=y_unit)


def _levels(y: Scale, ticks: Sequence[float]) -> list[Mark]:
    """A line across the plot for each tick, and what it is."""
    levels = [(100 - y(tick), short(tick)) for tick in ticks]
    lines = [Mark("line", {"class": "grid", "x1": 0, "x2": "100%", "y1": f"{at}%", "y2": f"{at}%"}) for at, _ in levels]
    return lines + [Mark("text", {"x": 6, "y": f"{at:.2f}%", "dy": -4}, text) for at, text in levels]


@dataclass(frozen=True)
class Drawn:
    """Shapes of the plot itself, of each run, and of the x axis below."""

    shapes: Sequence[Mark]
    points: Sequence[tuple[str, Sequence[Mark]]]
    axis: Sequence[Mark]


def curve(points: Sequence[Point], *, apart: float = 4.0) -> Drawn:
    """At least two points in the order of x, joined by lines: x logarithmic, with a tick for each of them that is `apart` percent
    of the width from the next one's; y from 0."""
    margin = (points[-1].x / points[0].x) ** MARGIN
    x, y = Scale(points[0].x / margin, points[-1].x * margin, log=True), Scale(0, 1.15 * max(p.y for p in points))
    shapes = _levels(y, [tick for tick in y.ticks(4) if tick])
    places = [(f"{x(p.x)}%", f"{100 - y(p.y):.3f}%") for p in points]
    drawn: list[tuple[str, list[Mark]]] = []
    for i, (p, (cx, cy)) in enumerate(zip(points, places, strict=True)):
        marks = [Mark("circle", {"class": "dot", "cx": cx, "cy": cy, "r": 5}, hint=p.hint)]
        if i:  # with the later point, so that a filter that hides it hides the way to it
            (x1, y1), end = places[i - 1], {"x2": cx, "y2": cy}
            marks.insert(0, Mark("line", {"class": "way", "x1": x1, "y1": y1} | end))
        # On the side that the line does not come from.
        rises = points[max(i, 1)].y > points[max(i, 1) - 1].y
        beside = {"dx": 6, "text-anchor": "end"} if rises else {"dx": -6, "text-anchor": "start"}
        marks.append(Mark("text", {"class": "name", "x": cx, "y": cy, "dy": -9} | beside, p.text))
        drawn.append((p.run, marks))
    ticks: list[tuple[float, str]] = []
    for p in reversed(points):  # the furthest one says how far it goes
        if not ticks or ticks[-1][0] - x(p.x) >= apart:
            ticks.append((x(p.x), length(p.x)))
    axis = [Mark("text", {"x": f"{at}%", "y": 14, "text-anchor": "middle"}, text) for at, text in reversed(ticks)]
    return Drawn(shapes, drawn, axis)


def length(value: float) -> str:
    """65,536 as 64k, as lengths of prompts are named, and 262,016 as 255.9k."""
    return f"{value / 1024:.4g}k" if value >= 1024 else f"{value:g}"


def _named(points: Sequence[Point], x: Scale, y: Scale) -> list[tuple[str, list[Mark]]]:
    """Of each run a dot with its text beside it; a text that would lie on an earlier one goes below it."""
    parts: list[tuple[str, list[Mark]]] = []
    taken: list[tuple[float, float]] = []
    for p in points:
        cx, cy = x(p.x), 100 - y(p.y)
        below = 0
        while any(abs(cx - at) < 20 and abs(cy + below * LABEL - high) < LABEL for at, high in taken):
            below += 1
        taken.append((cx, cy + below * LABEL))
        side, anchor = (8, "start") if cx < 80 else (-8, "end")
        dot = Mark("circle", {"class": "dot", "cx": f"{cx}%", "cy": f"{cy:.3f}%", "r": 5}, hint=p.hint)
        place = {"x": f"{cx}%", "y": f"{cy + below * LABEL:.3f}%", "dx": side, "dy": 4, "text-anchor": anchor}
        parts.append((p.run, [dot, Mark("text", {"class": "name"} | place, p.text)]))
    return parts
