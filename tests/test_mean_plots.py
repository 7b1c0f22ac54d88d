"""Plots of means: where the axis is logarithmic, and what is drawn."""

import pytest

from ssl_dist.results import mean_plots
from ssl_dist.results.mean_plots import Line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, 4, 8], True), ([1e-3, 3e-3, 1e-2, 3e-2], True), ([1, 2, 5, 10], True), ([64, 256, 1024], True),
        ([1, 2, 3, 4, 5, 6, 7, 8], False), ([0.1, 0.2, 0.3], False), ([10, 11, 12.1], False), ([0, 1, 10], False),
        ([-4, -2, 8], False), ([1, 100], False), ([100, 200, 300, 400], False),
    ],
)  # fmt: skip
def test_a_geometric_series_is_one(values, expected):
    assert mean_plots.is_geometric(values) == expected


def test_words_stand_side_by_side_and_dollars_are_no_formula():
    figure = mean_plots.lines([Line("", [("b", 1.0, 0.1)])], ["a", "b"], ("$x", "y"), "$a_1$")
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"] and not figure.legends
    assert list(axes.containers[0][0].get_xdata()) == [1]
    assert mean_plots.as_png(figure).startswith(b"\x89PNG") and b"<svg" in mean_plots.as_svg(figure)
