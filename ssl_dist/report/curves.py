"""Curves of a run's metrics as inline SVG: no picture to load, sharp at any size, in the colours of the page."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ssl_dist.report.markup import render, style

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 34  # margins
MAX_POINTS = 240  # of a curve; of more lines, each point is the mean of several


@dataclass(frozen=True)
class Curve:
    """name: in the legend; style: number of its colour; points: (epoch, value), the epochs rising."""

    name: str
    style: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Frame:
    """The axes: epochs from 0 on and values, as places in the drawing."""

    last_epoch: float
    lowest: float
    highest: float

    def x(self, epoch: float) -> float:
        return round(LEFT + (WIDTH - RIGHT - LEFT) * epoch / self.last_epoch, 1)

    def y(self, value: float) -> float:
        return round(
            HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - self.lowest) / (self.highest - self.lowest), 1
        )


def chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    named: bool,
    from_zero: bool = False,
    limit: tuple[float, str] | None = None,
) -> Markup:
    """A figure with a caption, axes, a legend (named), and the curves' values for page.js.

    from_zero: the axis begins at 0; limit: (value, name) of a dashed line, shown where it is within the axis.
    """
    thinned = [(curve, _thin(curve.points)) for curve in curves]
    finite = [point for _, points in thinned for point in points if math.isfinite(point[1])]
    if not finite:
        return render("chart.html", title=title, unit=unit, frame=None)
    lowest, highest = min(low for _, _, low, _ in finite), max(high for *_, high in finite)
    ticks = _ticks(min(0.0, lowest) if from_zero else lowest, highest)
    frame = _Frame(max(x for x, *_ in finite) or 1.0, ticks[0], ticks[-1])
    values = [
        {"name": curve.name, "x": [_digits(x) for x, *_ in points], "y": [_digits(y) for _, y, *_ in points]}
        for curve, points in thinned
    ]
    return render(
        "chart.html", title=title, unit=unit, named=named, curves=curves, frame=frame, ticks=ticks,
        epochs=[tick for tick in _ticks(0.0, frame.last_epoch) if tick <= frame.last_epoch * 1.0001],
        limit=limit if limit is not None and ticks[0] < limit[0] < ticks[-1] else None,
        pieces=[piece for curve, points in thinned for piece in _pieces(curve, points, frame)],
        values=json.dumps(values, separators=(",", ":")), width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT,
        top=TOP, bottom=HEIGHT - BOTTOM,
    )  # fmt: skip


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most MAX_POINTS groups of neighbours; a group with a NaN is NaN."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    thinned = []
    for group in groups:
        values = [y for _, y in group]
        whole = all(map(math.isfinite, values))
        low, high = (min(values), max(values)) if whole else (math.nan, math.nan)
        thinned.append((group[-1][0], sum(values) / len(values) if whole else math.nan, low, high))
    return thinned


def _ticks(lowest: float, highest: float) -> list[float]:
    """Four to eight round values that enclose the range."""
    if highest - lowest <= 1e-9 * max(abs(lowest), abs(highest)):  # a constant
        room = abs(highest) / 2 or 1.0
        lowest, highest = lowest - room, highest + room
    step = 10 ** math.floor(math.log10((highest - lowest) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (highest - lowest) / (step * factor) <= 5)
    first, last = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    return [count * step for count in range(first, last + 1)]


def _pieces(curve: Curve, points: Sequence[tuple], frame: _Frame) -> list[dict]:
    """The places of the curve's `line`, broken where a value is no number; of the `band` behind it, the range where a
    point stands for several lines; of `dots`, where a piece has few points (a single one would make no line)."""
    pieces = []
    for is_finite, group in itertools.groupby(points, key=lambda point: math.isfinite(point[1])):
        piece = list(group)
        if not is_finite:
            continue
        line = [(frame.x(x), frame.y(y)) for x, y, _, _ in piece]
        band = []
        if any(low < high for _, _, low, high in piece):
            band = [(frame.x(x), frame.y(high)) for x, _, _, high in piece]
            band += [(frame.x(x), frame.y(low)) for x, _, low, _ in reversed(piece)]
        dots = line if len(piece) < 30 else []
        pieces.append({"style": style(curve.style), "line": line, "band": band, "dots": dots})
    return pieces


def _digits(value: float) -> float | None:
    """Five significant digits; None (JSON's null) for what is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
