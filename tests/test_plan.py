import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_dist.data import labels as labels_file
from ssl_dist.data import plan
from ssl_dist.data.plan import DataOrder
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_image_at_most_once_an_epoch_and_only_the_tail_is_missing(n, m, seed):
    if n < m:
        with pytest.raises(UserError, match=f"batch_size = {m}.*{n} images"):
            DataOrder(np.arange(n), m, seed)
        return
    p = DataOrder(np.arange(n) * 3, m, seed)
    for epoch in range(2):
        steps = range(epoch * p.steps_per_epoch, (epoch + 1) * p.steps_per_epoch)
        ids = np.concatenate([p.global_ids(s) for s in steps])
        assert len(set(ids)) == len(ids) == n - n % m
        assert set(ids) <= set(np.arange(n) * 3)


def test_ranks_join_to_the_global_batch_at_any_grid():
    p = DataOrder(np.arange(100), 12, 1)
    for g in (Grid(1, 1), Grid(2, 1), Grid(3, 2), Grid(4, 3)):
        for step in (0, 7, 8, 33):
            parts = [p.local_ids(step, g, r) for r in range(0, g.size, g.views)]
            assert np.array_equal(np.concatenate(parts), p.global_ids(step))
            for r in range(g.size):
                assert np.array_equal(p.local_ids(step, g, r), parts[r // g.views])


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    a, b, c = DataOrder(np.arange(50), 10, 0), DataOrder(np.arange(50), 10, 0), DataOrder(np.arange(50), 10, 1)
    assert np.array_equal(b.global_ids(7), a.global_ids(7))  # asked for out of order: no state
    assert np.array_equal(a.global_ids(2), b.global_ids(2))
    assert not np.array_equal(a.epoch_order(0), a.epoch_order(1))
    assert not np.array_equal(a.epoch_order(0), c.epoch_order(0))


def test_a_different_tail_is_dropped_every_epoch():
    p = DataOrder(np.arange(10), 4, 0)
    tails = {tuple(sorted(p.epoch_order(e)[8:])) for e in range(20)}
    assert len(tails) > 5


def test_limit_is_evenly_spaced():
    assert plan.limited(10, 4).tolist() == [0, 2, 5, 7]
    assert plan.limited(3, 5).tolist() == [0, 1, 2]
    assert plan.limited(3, None).tolist() == [0, 1, 2]


def test_per_class():
    labels = np.array([0, 1, 0, 1, 0, 1])
    assert plan.per_class(np.arange(6), labels, 2, 1).tolist() == [2, 3, 4, 5]
    with pytest.raises(UserError, match="class 0 has 3 images, not the 4"):
        plan.per_class(np.arange(6), labels, 3, 1)
    with pytest.raises(UserError, match="labels"):
        plan.per_class(np.arange(2), np.array([-1, 0]), 1, 0)


def test_list_file(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("# half of them\n3\n\n1\n")
    assert plan.from_list(str(path), 4).tolist() == [1, 3]
    path.write_text("\ufeff3\r\n1\r\n\r\n")  # as editors of Windows write it
    assert plan.from_list(str(path), 4).tolist() == [1, 3]
    bad = {"1\nx\n": "line 2: 'x'", "9\n": "line 1: '9'", "1\n1\n": "twice", "\n": "no id", "²": "'²'", "①": "'①'",
           "9" * 5000: "line 1: '9999", "0" * 5000 + "1": "line 1: '0000", "-1": "'-1'", "1.0": "'1.0'"}  # fmt: skip
    for text, words in bad.items():
        path.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            plan.from_list(str(path), 4)
        assert len(str(caught.value)) < 500
    path.write_bytes(b"\xff\xfe1\0")
    with pytest.raises(UserError, match="not a text file"):
        plan.from_list(str(path), 4)
    with pytest.raises(UserError, match="absent"):
        plan.from_list(str(tmp_path / "absent"), 4)


@pytest.mark.timeout(20)
def test_what_has_no_end_is_no_file(tmp_path):
    """A pipe would wait for its writer, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            plan.from_list(path, 4)
        with pytest.raises(UserError, match="not a regular file"):
            labels_file.read(path, 0, 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_share_of_every_class_is_held_out(labels, share, seed):
    labels = np.array(labels)
    ids = np.arange(len(labels)) * 3 + 1
    counts = np.bincount(labels, minlength=4)
    if (counts == 1).any():
        with pytest.raises(UserError, match=f"class {list(counts).index(1)} has one image"):
            plan.held_out(ids, labels, share, seed)
        return
    held_ids = plan.held_out(ids, labels, share, seed)
    assert held_ids.tolist() == sorted(set(held_ids)) and set(held_ids) <= set(ids)
    counts_held = np.bincount(labels[(held_ids - 1) // 3], minlength=4)
    for count, number in zip(counts, counts_held, strict=True):
        assert number == (min(max(1, int(share * count + 0.5)), count - 1) if count else 0)


def test_what_is_held_out_is_a_function_of_the_seed_and_of_the_class_alone():
    ids, labels = np.arange(300), np.arange(300) % 3
    held_ids = plan.held_out(ids, labels, 0.1, 5)
    assert np.array_equal(held_ids, plan.held_out(ids[::-1], labels[::-1], 0.1, 5)), "the order of images says nothing"
    assert not np.array_equal(held_ids, plan.held_out(ids, labels, 0.1, 6))
    without_the_last = plan.held_out(ids[labels < 2], labels[labels < 2], 0.1, 5)
    assert np.array_equal(without_the_last, held_ids[held_ids % 3 < 2]), "another class may come or go"
    positions = [set(held_ids[held_ids % 3 == label] // 3) for label in range(3)]
    assert positions[0] != positions[1] != positions[2], "each class has a draw of its own"
    with pytest.raises(UserError, match=r"--validation 0\.1: needs labels, and 1 images of this split have none"):
        plan.held_out(ids, np.where(ids == 7, -1, labels), 0.1, 5)
