"""Plots of means over seeds: lines with error bars against what was varied, and bars of gains."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ssl_dist.results.charts import PALETTE, SHAPES
from ssl_dist.run.plots import new_plot

Place = str | int | float


@dataclass(frozen=True)
class Line:
    """points: (place, mean, standard deviation), none where nothing is measured. name: in the legend; empty: none."""

    name: str
    points: Sequence[tuple[Place, float, float]]


def lines(
    lines: Sequence[Line],
    places: Sequence[Place],
    axis_names: tuple[str, str],
    title: str = "",
    logarithmic: bool = False,
    size: tuple[float, float] = (7, 4.2),
) -> Figure:
    """Lines against `places`: where these are numbers, at their values; words stand side by side, and numbers of which
    two would stand in one spot, as 0, 0.01 and 1. The n-th line has the n-th colour and shape, also where one before it
    has no points. size: in inches."""
    figure, axes = _plot(size, axis_names, title)
    numeric = are_numbers(places) and (logarithmic or not _are_crowded([float(place) for place in places]))
    for number, line in enumerate(lines):
        if not line.points:
            continue
        xs, means, stds = zip(*line.points, strict=True)
        at = list(xs) if numeric else [places.index(x) for x in xs]
        axes.errorbar(
            at, means, stds, label=line.name, color=PALETTE[number % len(PALETTE)], marker=SHAPES[number % len(SHAPES)],
            markersize=4, linewidth=1.5, capsize=3,
        )  # fmt: skip
    if logarithmic:
        axes.set_xscale("log", base=2)
    if numeric:
        axes.set_xticks(list(places), map(_short, places))
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(places)), map(_short, places))
    _legend(figure, axes)
    return figure


def bars(lines: Sequence[Line], places: Sequence[Place], axis_names: tuple[str, str], title: str) -> Figure:
    """Bars in groups, one at each of `places`; a bar of a group for each line."""
    figure, axes = _plot((7, 4.2), axis_names, title)
    width = 0.8 / len(lines)
    for number, line in enumerate(lines):
        if line.points:
            xs, means, stds = zip(*line.points, strict=True)
            left = [places.index(x) + (number - (len(lines) - 1) / 2) * width for x in xs]
            axes.bar(left, means, width, yerr=stds, label=line.name, color=PALETTE[number % len(PALETTE)], capsize=2)
    axes.set_xticks(range(len(places)), map(str, places))
    axes.axhline(0, color="#444444", linewidth=0.8)
    _legend(figure, axes)
    return figure


def are_numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def is_geometric(values: Sequence[float]) -> bool:
    """Whether at least three rising values, the last four times the first or more, are spaced more evenly on a
    logarithmic axis than on a linear one: 2, 4, 8, and 1, 3, 10, 30, but not 1, 2, 3, 4, 5."""
    if len(values) < 3 or values[0] <= 0 or values[-1] < 4 * values[0]:
        return False
    return _unevenness([math.log(value) for value in values]) < _unevenness(values)


def _are_crowded(values: Sequence[float]) -> bool:
    """Whether two values are nearer than a label is wide."""
    values = sorted(values)
    return any(high - low < 0.04 * (values[-1] - values[0]) for low, high in pairwise(values))


def _unevenness(values: Sequence[float]) -> float:
    """Standard deviation of the gaps, in units of their mean."""
    gaps = [high - low for low, high in pairwise(values)]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


def as_png(figure: Figure) -> bytes:
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def as_svg(figure: Figure) -> bytes:
    file = BytesIO()
    FigureCanvasSVG(figure).print_svg(file)
    return file.getvalue()


def _plot(size: tuple[float, float], axis_names: tuple[str, str], title: str) -> tuple[Figure, Axes]:
    figure, axes = new_plot(*size)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_xlabel(_plain(axis_names[0]))
    axes.set_ylabel(_plain(axis_names[1]))
    if title:
        axes.set_title(_plain(title), fontsize=10)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    if any(axes.get_legend_handles_labels()[1]):
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)


def _short(value: Place) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """Without what matplotlib takes for a formula."""
    return text.replace("$", r"\$")
