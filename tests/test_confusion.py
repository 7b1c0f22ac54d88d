"""Confusion counts, the choice of images for pictures, and what the captions say."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from ssl_dist import evaluators
from ssl_dist.keys import hash64
from ssl_dist.results import confusion
from ssl_dist.results.sampling import evenly
from ssl_dist.storage.features import Features
from tests.figure_writer import MemoryFigureWriter


def part(labels, classes=("cat", "dog", "owl"), features=None):
    metadata = {"classes": json.dumps(list(classes)), "dataset": "pets", "split": "test"}
    features = np.zeros((len(labels), 1), np.float32) if features is None else features
    return Features(features, np.asarray(labels), np.arange(len(labels)), metadata)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_the_matrix_is_scikit_learns(pairs):
    true, predicted = np.array(pairs).T
    assert np.array_equal(confusion.matrix(true, predicted, 5), confusion_matrix(true, predicted, labels=np.arange(5)))


def test_the_captions_say_what_is_seen():
    writer, labels = MemoryFigureWriter(), [0] * 8 + [1] * 2 + [2] * 2
    predicted = np.array([0] * 6 + [1] * 4 + [2] * 2)
    confusion.add_pictures(writer, part(labels), ["cat", "dog", "owl"], predicted, "x", "a guess")
    assert list(writer.pictures) == ["x-confusion", "x-classes"]
    _, title, caption = writer.pictures["x-confusion"]
    assert title == "Confusions of a guess" and "12 images of pets test" in caption
    assert "83.33 % of all images are right. Most frequent: cat taken for dog (25 %)." in caption
    assert "All that are wrong: figures/x-errors.csv." in caption
    assert writer.tables["x-errors"] == [
        ("image_id", "file", "class", "predicted"), (6, "test/6.jpg", "cat", "dog"), (7, "test/7.jpg", "cat", "dog")
    ]  # fmt: skip
    confusion.add_pictures(writer, part(labels), ["cat", "dog", "owl"], np.array(labels), "y", "a guess")
    assert "No image is taken for another class." in writer.pictures["y-confusion"][2]


def test_too_many_classes_have_no_matrix():
    writer = MemoryFigureWriter()
    confusion.add_pictures(writer, part([0, 10**7]), range(10**7 + 1), np.array([0, 10**7]), "x", "a guess")
    assert not writer.pictures


def test_labels_without_a_name_are_named_by_their_number():
    assert confusion.class_names(part([0, 1], classes=["cat"]), part([3], classes=["cat"])) == ["cat", "1", "2", "3"]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 45), st.integers(0, 9))
def test_rows_are_chosen_evenly_over_the_classes(labels, limit, seed):
    labels = np.array(labels)
    rows = evenly(labels, limit, hash64(seed))
    assert len(rows) == min(limit, len(labels)) and (np.diff(rows) > 0).all()
    chosen, all_of_them = (np.bincount(labels[which], minlength=6) for which in (rows, np.arange(len(labels))))
    most = chosen.max()
    assert ((chosen >= most - 1) | (chosen == all_of_them)).all()


def test_the_key_decides_which_rows():
    labels = np.arange(100) % 10
    assert np.array_equal(evenly(labels, 20, hash64(1)), evenly(labels, 20, hash64(1)))
    assert not np.array_equal(evenly(labels, 20, hash64(1)), evenly(labels, 20, hash64(2)))


def blobs(count, seed):
    """Three classes that overlap; the labels are 0, 1 and 4."""
    generator = np.random.default_rng(seed)
    labels = np.array([0, 1, 4])[np.arange(count) % 3]
    features = (generator.standard_normal((count, 4)) + labels[:, None]).astype(np.float32)
    return part(labels, "abcde", features)


@pytest.mark.parametrize(
    ("name", "overrides", "value", "how"),
    [
        ("knn", ["knn.k=[3,11,5]", "knn.temperature=[0.2,0.07]"], "knn11_T0.2_top1", "kNN with 11 neighbours"),
        ("knn", ["knn.k=[3]", "knn.memory_mb=1"], "knn3_top1", "kNN with 3 neighbours"),
        ("logistic", ["logistic.memory_mb=1"], "logistic_top1", "logistic regression"),
    ],
)
def test_the_pictures_of_a_classifier_show_its_errors(name, overrides, value, how):
    train, test = blobs(90, 0), blobs(41, 1)
    evaluator, options = evaluators.find(name), evaluators.parse_options([name], overrides)[name]
    writer = MemoryFigureWriter()
    values = evaluator.run(train, test, options, writer)
    assert values == evaluator.run(train, test, options)
    assert list(writer.pictures) == [f"{name}-confusion", f"{name}-classes"]
    figure, title, caption = writer.pictures[f"{name}-confusion"]
    assert title == f"Confusions of {how}" and f"{values[value]:.2f} % of all images are right" in caption
    share = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    assert np.isnan(share[[2, 3]]).all(), "classes without a test image"
    right = np.nansum(np.diagonal(share) * np.bincount(test.labels, minlength=5)) / len(test)
    assert right == pytest.approx(values[value])
    assert f"all images {values[value]:.1f}" in writer.texts(f"{name}-classes")
    assert not {"c", "d"} & set(writer.texts(f"{name}-classes"))


def test_of_equal_votes_the_picture_takes_the_lower_class():
    train = part([1, 0], "ab", np.ones((2, 1), np.float32))
    test = part([0, 1, 1], "ab", np.ones((3, 1), np.float32))
    writer = MemoryFigureWriter()
    assert evaluators.find("knn").run(train, test, evaluators.find("knn").Options(k=[2]), writer)["knn2_top1"] < 34
    assert np.array_equal(writer.pictures["knn-confusion"][0].axes[0].images[0].get_array(), [[100, 0], [100, 0]])
