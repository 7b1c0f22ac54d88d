"""Confusion counts, the choice of images for pictures, and what the captions say."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from ssl_dist.evaluators import confusion
from ssl_dist.evaluators.sampling import evenly
from ssl_dist.features_file import Features
from ssl_dist.keys import hash64
from tests.albums import Sketchbook


def part(labels, classes=("cat", "dog", "owl")):
    known = {"classes": json.dumps(list(classes)), "dataset": "pets", "split": "test"}
    return Features(np.zeros((len(labels), 1), np.float32), np.asarray(labels), np.arange(len(labels)), known)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_the_matrix_is_scikit_learns(pairs):
    true, predicted = np.array(pairs).T
    assert np.array_equal(confusion.matrix(true, predicted, 5), confusion_matrix(true, predicted, labels=np.arange(5)))


def test_the_captions_say_what_is_seen():
    album, labels = Sketchbook(), [0] * 8 + [1] * 4
    confusion.add_pictures(album, part(labels), ["cat", "dog", "owl"], np.array([0] * 6 + [1] * 6), "x", "a guess")
    assert list(album.pictures) == ["x-confusion", "x-classes"]
    _, title, caption = album.pictures["x-confusion"]
    assert title == "Confusions of a guess" and "12 images of pets test" in caption
    assert "83.33 % of all images are right. Most frequent: cat taken for dog (25 %)." in caption
    confusion.add_pictures(album, part(labels), ["cat", "dog", "owl"], np.array(labels), "y", "a guess")
    assert "No image is taken for another class." in album.pictures["y-confusion"][2]


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
