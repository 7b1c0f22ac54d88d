"""The figure of a study: lines with error bars against the values of an axis, or bars of a gain."""

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from ssl_dist.results import mean_plots
from ssl_dist.results.mean_plots import Line
from ssl_dist.study.numbers import Number
from ssl_dist.study.spec import FigureSpec, Study, Value


def draw(study: Study, spec: FigureSpec, numbers: Sequence[Number]) -> Figure:
    """What `spec` asks for, of the numbers that are there. Error bars are standard deviations over seeds."""
    values: dict[tuple[Value, ...], list[float]] = {}
    for number in numbers:
        if number.measure.column == spec.column:
            labels = number.training.labels
            of_gain = () if spec.gain is None else (labels[spec.gain.axis],)
            values.setdefault((labels[spec.by], labels[spec.x], *of_gain), []).append(number.value)
    places = study.values(spec.x)
    lines = []
    for name in study.values(spec.by):
        points = [(place, *_mean_std(spec, values, name, place)) for place in places]
        lines.append(Line(str(name), [(place, mean, std) for place, mean, std in points if mean is not None]))
    if spec.gain is None:
        numbers_x = [place for place in places if isinstance(place, int | float)]
        series = len(numbers_x) == len(places) and mean_plots.is_geometric(sorted(numbers_x))
        logarithmic = series if spec.logarithmic is None else spec.logarithmic
        return mean_plots.lines(lines, places, (spec.x, f"{spec.column} (%)"), study.title, logarithmic)
    gain = f"{spec.column}: {spec.gain.of} less {spec.gain.over} (points)"
    return mean_plots.bars(lines, places, (spec.x, gain), study.title)


def _mean_std(
    spec: FigureSpec, values: dict[tuple[Value, ...], list[float]], name: Value, place: Value
) -> tuple[float | None, float]:
    """Of a gain the deviations of both means add up as those of independent numbers."""
    if spec.gain is None:
        found = values.get((name, place), [])
        return (statistics.fmean(found), _std(found)) if found else (None, 0.0)
    low, high = (values.get((name, place, value), []) for value in (spec.gain.over, spec.gain.of))
    if not low or not high:
        return None, 0.0
    return statistics.fmean(high) - statistics.fmean(low), (_std(low) ** 2 + _std(high) ** 2) ** 0.5


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
