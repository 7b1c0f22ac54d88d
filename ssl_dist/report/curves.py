"""Curves of a run's metrics as inline SVG: no picture to load, sharp at any size, in the colours of the page.

page.js shows the values under the pointer; it finds them in the attribute data-curves.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssl_dist.report.markup import Html, element, number

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 34
MAX_POINTS = 240  # of a curve; of more lines, each point is the mean of several
COLOURS = 8  # classes c0 to c7 in page.css


@dataclass(frozen=True)
class Curve:
    """name: in the legend; style: number of its colour; points: (epoch, value), the epochs rising."""

    name: str
    style: int
    points: Sequence[tuple[float, float]]


def chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    named: bool,
    from_zero: bool = False,
    limit: tuple[float, str] | None = None,
) -> Html:
    """A figure with a caption, axes, a legend (named), and the curves' values for page.js.

    from_zero: the axis begins at 0; limit: (value, name) of a dashed line, shown where it is within the axis.
    """
    thinned = [(curve, _thin(curve.points)) for curve in curves]
    finite = [
        (x, low, high) for _, points in thinned for x, _, low, high in points if all(map(math.isfinite, (low, high)))
    ]
    if not finite:
        return element("figure", _caption(title, unit), element("p", "No number was logged.", class_="none"))
    right = max(x for x, _, _ in finite) or 1.0
    lowest, highest = min(low for _, low, _ in finite), max(high for _, _, high in finite)
    ticks = _ticks(min(0.0, lowest) if from_zero else lowest, highest)
    frame = (0.0, right, ticks[0], ticks[-1])
    shapes = [*_axes(frame, ticks)]
    if limit is not None and ticks[0] < limit[0] < ticks[-1]:
        y = _y(limit[0], frame)
        shapes.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="limit"))
        shapes.append(element("text", limit[1], x=WIDTH - RIGHT, y=y - 4, class_="limit end"))
    for curve, points in thinned:
        shapes += _drawn(curve, points, frame)
    shapes.append(element("line", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, class_="cursor"))
    values = [
        {"name": curve.name, "x": [_digits(x) for x, *_ in points], "y": [_digits(y) for _, y, *_ in points]}
        for curve, points in thinned
    ]
    svg = element(
        "svg", *shapes, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title} over the epochs",
        data_curves=json.dumps(values, separators=(",", ":")), data_frame=json.dumps([LEFT, WIDTH - RIGHT, right]),
    )  # fmt: skip
    return element("figure", _caption(title, unit), svg, _legend(curves) if named else None)


def _caption(title: str, unit: str) -> Html:
    return element(
        "figcaption", element("b", title), f" ({unit})" if unit else None, element("output", class_="reading")
    )


def _legend(curves: Sequence[Curve]) -> Html:
    keys = [element("span", curve.name, class_=f"key c{curve.style % COLOURS}") for curve in curves]
    return element("div", *keys, class_="legend")


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


def _axes(frame: tuple, ticks: Sequence[float]) -> list[Html]:
    shapes = []
    for value in ticks:
        y = _y(value, frame)
        shapes.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        shapes.append(element("text", number(round(value, 12)), x=LEFT - 6, y=y + 4, class_="end"))
    for value in [tick for tick in _ticks(0.0, frame[1]) if tick <= frame[1] * 1.0001]:
        shapes.append(element("text", number(value), x=_x(value, frame), y=HEIGHT - BOTTOM + 15, class_="middle"))
    shapes.append(element("text", "epoch", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="middle"))
    return shapes


def _drawn(curve: Curve, points: Sequence[tuple], frame: tuple) -> list[Html]:
    """The line, broken where a value is no number; behind it the range where a point stands for several lines."""
    shapes, style = [], f"c{curve.style % COLOURS}"
    for piece in _pieces(points):
        line = " ".join(f"{_x(x, frame)},{_y(y, frame)}" for x, y, _, _ in piece)
        if any(low < high for _, _, low, high in piece):
            edge = [(x, high) for x, _, _, high in piece] + [(x, low) for x, _, low, _ in reversed(piece)]
            band = " ".join(f"{_x(x, frame)},{_y(y, frame)}" for x, y in edge)
            shapes.append(element("polygon", points=band, class_=f"band {style}"))
        shapes.append(element("polyline", points=line, class_=style))
        if len(piece) < 30:  # few enough to show where they are; a single one would make no line
            shapes += [element("circle", cx=_x(x, frame), cy=_y(y, frame), r=2, class_=style) for x, y, _, _ in piece]
    return shapes


def _pieces(points: Sequence[tuple]) -> list[list[tuple]]:
    pieces: list[list[tuple]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _x(value: float, frame: tuple) -> float:
    return round(LEFT + (WIDTH - RIGHT - LEFT) * value / frame[1], 1)


def _y(value: float, frame: tuple) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - frame[2]) / (frame[3] - frame[2]), 1)


def _digits(value: float) -> float | None:
    """Five significant digits; None (JSON's null) for what is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
