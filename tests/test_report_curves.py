"""Curves as SVG: where a value stands, gaps, thinning."""

import json
import math
import re
import xml.etree.ElementTree as ET

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ssl_dist.report import curves
from ssl_dist.report.curves import HEIGHT, LEFT, MAX_POINTS, RIGHT, WIDTH, Curve, chart


def drawn(*lines, **options):
    """The parsed figure of curves that are given as lists of (epoch, value)."""
    named = [Curve(f"run {number}", number, points) for number, points in enumerate(lines)]
    return ET.fromstring(chart("loss", "", named, named=len(lines) > 1, **options))


def polylines(figure):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in figure.iter("polyline")
    ]


def test_values_stand_where_the_axis_says():
    figure = drawn([(0.0, 0.0), (2.0, 5.0), (4.0, 10.0)])
    [[first, middle, last]] = polylines(figure)
    assert first[0] == LEFT and last[0] == WIDTH - RIGHT and middle[0] == (first[0] + last[0]) / 2
    assert first[1] > middle[1] > last[1] and middle[1] == pytest.approx((first[1] + last[1]) / 2)
    labels = {t.text: float(t.get("y")) for t in figure.iter("text") if t.get("class") == "end"}
    assert labels["0"] - 4 == first[1] and labels["10"] - 4 == last[1]


def test_a_curve_is_broken_where_it_is_no_number():
    points = [(float(n), math.nan if n in (3, 7) else 1.0 + n) for n in range(10)]
    figure = drawn(points)
    assert [len(line) for line in polylines(figure)] == [3, 3, 2]
    [svg] = figure.iter("svg")
    [values] = json.loads(svg.get("data-curves"))
    assert values["y"][3] is None and values["y"][4] == 5 and "NaN" not in svg.get("data-curves")
    assert not list(drawn([(0.0, math.nan)]).iter("svg"))


def test_a_single_value_is_seen():
    assert len(list(drawn([(1.0, 3.0)]).iter("circle"))) == 1


def test_a_long_curve_is_thinned_and_keeps_its_range():
    points = [(n / 100, 100.0 if n == 5555 else math.sin(n)) for n in range(10_000)]
    figure = drawn(points)
    [line] = polylines(figure)
    assert 100 < len(line) <= MAX_POINTS
    [band] = [p.get("points") for p in figure.iter("polygon")]
    heights = [float(point.split(",")[1]) for point in band.split()]
    assert min(heights) == pytest.approx(8, abs=1)  # the one high value reaches the top
    assert len(chart("loss", "", [Curve("a", 0, points)], named=False)) < 30_000


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_ticks_enclose_the_range_and_are_few(low, high):
    low, high = min(low, high), max(low, high)
    ticks = curves._ticks(low, high)
    assert 3 <= len(ticks) <= 8 and ticks == sorted(ticks) and len(set(ticks)) == len(ticks)
    room = 1e-6 * max(abs(low), abs(high), ticks[1] - ticks[0])
    assert ticks[0] <= low + room and high - room <= ticks[-1]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30))
def test_any_values_can_be_drawn(values):
    text = chart("loss", "", [Curve("a", 0, [(float(n), v) for n, v in enumerate(values)])], named=True, from_zero=True)
    for points in re.findall(r'points="([^"]*)"', text):
        for x, y in (map(float, point.split(",")) for point in points.split()):
            assert LEFT <= x <= WIDTH - RIGHT and 0 <= y <= HEIGHT


def test_a_limit_is_drawn_where_it_is_within_the_axis():
    def dashed(limit):
        return [line for line in drawn([(0.0, 0.1), (1.0, 1.0)], limit=(limit, "below")).iter("line")
                if line.get("class") == "limit"]  # fmt: skip

    assert len(dashed(0.5)) == 1 and not dashed(5.0)
