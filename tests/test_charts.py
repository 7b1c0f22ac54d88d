"""The figures of an evaluation: every name and number at its place, for few classes and for many."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from ssl_dist.results import charts
from tests.figure_writer import drawn


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def overlapping(figure):
    """Pairs of texts in the figure whose boxes share pixels."""
    drawn(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in figure.findobj(Text) if t.get_text().strip()]
    boxes = [(text, box.shrunk(0.9, 0.9)) for text, box in boxes if text and box.width > 1]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[i + 1 :] if one.overlaps(two) and a != b]


def test_a_confusion_matrix():
    share = np.array([[90, 10, 0], [25, 75, 0.4], [np.nan] * 3])
    figure = charts.confusion(share, ["a cat", "dog", "none"])
    shown = texts(figure)
    assert {"90", "10", "25", "75", "a cat", "dog", "predicted class", "true class"} <= set(shown)
    assert "0" not in [t.get_text() for t in figure.axes[0].texts], "cells below half a percent are blank"
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a cat", "dog", "none"]
    assert overlapping(figure) == []
    image = figure.axes[0].images[0]
    assert np.ma.getmaskarray(image.get_array())[2].all(), "a class without images has no colour of a number"


@pytest.mark.parametrize(("count", "numbers", "names"), [(20, True, True), (21, False, True), (200, False, False)])
def test_many_classes_leave_out_what_has_no_room(count, numbers, names):
    figure = charts.confusion(np.eye(count) * 100, [f"class {i:03}" for i in range(count)])
    drawn(figure)
    assert bool(figure.axes[0].texts) == numbers and ("class 000" in texts(figure)) == names
    assert figure.get_size_inches().max() < 12


def test_bars_fall_and_leave_out_classes_without_images():
    figure = charts.class_bars(np.array([20, np.nan, 80.26, 50, 50]), list("abcde"), 47.3, "% right")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "d", "e", "a"]
    assert [bar.get_width() for bar in axes.patches] == [80.26, 50, 50, 20]
    assert {"80.3", "all images 47.3", "% right"} <= set(texts(figure))
    drawn(figure)
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the best stands at the top"


def test_of_many_classes_the_best_and_the_worst_have_bars():
    values = np.arange(100.0)
    figure = charts.class_bars(values, [f"class {i}" for i in range(100)], 50, "% right")
    assert sorted(bar.get_width() for bar in figure.axes[0].patches) == [*range(20), *range(80, 100)]
    assert "... 60 classes between ..." in texts(figure)
    drawn(figure)


def test_frames_say_which_neighbours_are_wrong():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    figure = charts.neighbours([("a title", [(images, ["cat", "cat", "a_very_long_name"])])])
    query, right, wrong = figure.axes
    assert not query.spines["top"].get_visible()
    frames = [axes.spines["top"] for axes in (right, wrong)]
    assert [to_hex(frame.get_edgecolor()).upper() for frame in frames] == [charts.RIGHT, charts.WRONG]
    assert [frame.get_linestyle() for frame in frames] != ["-", "-"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["cat", "", "a_very_lon…"]
    assert overlapping(figure) == []


def test_names_are_no_formulas():
    drawn(charts.class_bars(np.array([50.0, 20]), ["a$b", "c$_{"], 30, "% right"))


def test_points_have_a_legend_of_the_classes_that_are_there():
    labels = np.array([0, 2, 2, 5])
    figure = charts.points(np.arange(8.0).reshape(4, 2), labels, list("abcdef"), ("x", "y"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "c", "f"]
    groups = figure.axes[0].collections
    assert [len(group.get_offsets()) for group in groups] == [1, 2, 1]
    assert len({to_hex(group.get_facecolor()[0]) for group in groups}) == 3
    drawn(figure)
    many = charts.points(np.zeros((30, 2)), np.arange(30), [str(i) for i in range(30)], ("x", "y"))
    assert not many.legends


def test_images_stand_where_the_map_has_them():
    images = np.zeros((5, 4, 4, 3), np.uint8)
    images[:] = np.array([10, 20, 30, 40, 50])[:, None, None, None]
    # The second, third and last share a cell, whose middle is nearest to the third; the fourth is the highest.
    xy = np.array([[0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.5, 1.0], [0.98, 0.24]])
    figure = charts.image_map(xy, images, np.array([0, 1, 1, 2, 1]), ["a", "b", "c"], cells=4)
    page = figure.axes[0].images[0].get_array()
    assert page.shape == (40, 40, 3)
    centres = {(row, column): int(page[10 * row + 5, 10 * column + 5, 0]) for row in range(4) for column in range(4)}
    assert {place: value for place, value in centres.items() if value != 255} == {
        (3, 0): 10,
        (3, 3): 30,
        (0, 2): 40,
    }
    assert to_hex(page[35, 1] / 255).upper() == charts.PALETTE[0], "the frame has the colour of the class"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    drawn(figure)
    many = charts.image_map(np.random.default_rng(0).random((20, 2)), np.zeros((20, 4, 4, 3), np.uint8),
                            np.arange(20), [str(i) for i in range(20)])  # fmt: skip
    assert not many.legends


def test_titles_of_clusters_stay_beside_their_images():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    title = "cluster 1: 1,000 images\n100 % tinca tinca, tinca or tench"
    figure = charts.clusters([(title, images, np.array([False, True]))])
    drawn(figure)
    (text,) = figure.texts
    assert text.get_text() == "cluster 1: 1,000 images\n100 % tinca tinca, tinca …"
    edge = min(axes.get_window_extent().x0 for axes in figure.axes)
    assert text.get_window_extent(figure.canvas.get_renderer()).x1 < edge
