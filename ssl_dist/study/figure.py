"""The figure of a study: lines with error bars against the values of an axis, or bars of a gain."""

import statistics
from collections.abc import Sequence
from io import BytesIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ssl_dist.results.charts import PALETTE, SHAPES
from ssl_dist.run.plots import new_plot
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
    figure, axes = new_plot(7, 4.2)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    lines, places = study.values(spec.by), study.values(spec.x)
    numeric = all(isinstance(place, int | float) for place in places)
    for line, name in enumerate(lines):
        points = [(place, *_mean_std(study, spec, values, name, place)) for place in places]
        there = [(place, mean, std) for place, mean, std in points if mean is not None]
        if not there:
            continue
        xs, means, stds = zip(*there, strict=True)
        color = PALETTE[line % len(PALETTE)]
        if spec.gain is None:
            at = list(xs) if numeric else [places.index(x) for x in xs]
            axes.errorbar(
                at, means, stds, label=str(name), color=color, marker=SHAPES[line % len(SHAPES)], markersize=4,
                linewidth=1.5, capsize=3,
            )  # fmt: skip
        else:
            width = 0.8 / len(lines)
            left = [places.index(x) + (line - (len(lines) - 1) / 2) * width for x in xs]
            axes.bar(left, means, width, yerr=stds, label=str(name), color=color, capsize=2)
    if spec.logarithmic:
        axes.set_xscale("log", base=2)
    if spec.gain is not None or not numeric:
        axes.set_xticks(range(len(places)), map(str, places))
    else:
        axes.set_xticks(places, map(str, places))
        axes.minorticks_off()
    axes.set_xlabel(spec.x)
    if spec.gain is None:
        axes.set_ylabel(f"{spec.column} (%)")
    else:
        axes.set_ylabel(f"{spec.column}: {spec.gain.of} less {spec.gain.over} (points)")
        axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_title(study.title, fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _mean_std(
    study: Study, spec: FigureSpec, values: dict[tuple[Value, ...], list[float]], name: Value, place: Value
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


def as_png(figure: Figure) -> bytes:
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def as_svg(figure: Figure) -> bytes:
    file = BytesIO()
    FigureCanvasSVG(figure).print_svg(file)
    return file.getvalue()
