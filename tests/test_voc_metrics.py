"""The devkit's counts against slow loops written from its rules, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, jaccard_score

from ssl_dist.voc.data import Objects
from ssl_dist.voc.metrics import (
    IOU_THRESHOLDS,
    Detections,
    average_precision,
    class_iou,
    classification_ap,
    confusion,
    iou,
    ranking,
)

# ------------------------------------------------------------------------------------------- slow references


def slow_ap(hits, num_positives):
    """VOCevalcls.m of 2007 and of 2010, with recalls as fractions."""
    from fractions import Fraction

    points = []
    for n in range(1, len(hits) + 1):
        hit_count = sum(hits[:n])
        points.append((Fraction(hit_count, num_positives), Fraction(hit_count, n)))
    eleven = Fraction(0)
    for k in range(11):
        eleven += max((p for r, p in points if r >= Fraction(k, 10)), default=Fraction(0)) / 11
    area, before = Fraction(0), Fraction(0)
    for recall in sorted({r for r, _ in points}):
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return float(eleven), float(area)


def slow_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def slow_detection_ap(detections, true, threshold):
    """VOCevaldet.m for one class. detections: (image, score, box), in the order of images;
    true: (image, box, difficult)."""
    hits, taken = [], set()
    for image, _, box in sorted(detections, key=lambda one: -one[1]):  # stable
        best, which = -1.0, None
        for number, (other, true_box, _) in enumerate(true):
            if other == image and slow_iou(box, true_box) > best:
                best, which = slow_iou(box, true_box), number
        if which is None or best < threshold:
            hits.append(False)
        elif true[which][2]:
            continue
        else:
            hits.append(which not in taken)
            taken.add(which)
    positives = sum(not difficult for *_, difficult in true)
    return slow_ap(hits, positives) if positives else (np.nan, np.nan)


# --------------------------------------------------------------------------------------------------- rankings


@given(st.lists(st.booleans(), min_size=0, max_size=30), st.integers(0, 12))
def test_average_precision_equals_the_slow_loop(hits, unranked):
    positives = sum(hits) + unranked
    actual = average_precision(np.array(hits, np.bool_), positives)
    if positives == 0:
        assert np.isnan(actual).all()
    else:
        assert actual == pytest.approx(slow_ap(hits, positives), abs=1e-12)


def test_by_hand():
    # 2 positives at ranks 1 and 3: p = 1 up to recall 0.5, then 2/3
    eleven, area = average_precision(np.array([True, False, True]), 2)
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11) and area == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([True] * 7), 7) == (1.0, 1.0)
    assert average_precision(np.array([], np.bool_), 3) == (0.0, 0.0)
    # Recall 3 / 10 is 0.3, which np.arange(0, 1.1, 0.1)[3] is above: decided in integers it counts.
    assert average_precision(np.array([True] * 3), 10)[0] == pytest.approx(4 / 11)


def test_difficult_images_do_not_count_and_ties_keep_their_order():
    scores, labels = np.array([0.9, 0.8, 0.8, 0.1]), np.array([0, -1, 1, 1])
    assert classification_ap(scores, labels) == average_precision(np.array([False, True, True]), 2)
    assert ranking(np.array([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_the_area_is_above_sklearns_sum_and_equal_where_precision_only_falls():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = rng.choice([-1, 1], 40), rng.normal(size=40)
        labels[0] = 1
        assert classification_ap(scores, labels)[1] >= average_precision_score(labels > 0, scores) - 1e-12
    labels = np.array([1, 1, -1, 1, -1, -1])
    scores = -np.arange(6.0)
    assert classification_ap(scores, labels)[1] == pytest.approx(average_precision_score(labels > 0, scores))


# ------------------------------------------------------------------------------------------------------ boxes


def random_boxes(rng, count):
    low = rng.integers(0, 12, (count, 2))
    return np.concatenate([low, low + rng.integers(1, 12, (count, 2))], 1).astype(np.float32)


def test_iou():
    rng = np.random.default_rng(1)
    first, second = random_boxes(rng, 9), random_boxes(rng, 7)
    np.testing.assert_allclose(iou(first, second), [[slow_iou(a, b) for b in second] for a in first], atol=1e-12)
    assert iou(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 2, 2], [2, 0, 4, 2], [1, 0, 3, 2]])).tolist() == [
        [1.0, 0.0, 1 / 3]
    ]


@pytest.mark.parametrize("seed", range(8))
def test_detections_equal_the_slow_loop(seed):
    rng = np.random.default_rng(seed)
    counted = Detections(3)
    detections, true = [[] for _ in range(3)], [[] for _ in range(3)]
    for image in range(12):
        num_true, num_detections = rng.integers(0, 5), rng.integers(0, 8)
        true_boxes, boxes = random_boxes(rng, num_true), random_boxes(rng, num_detections)
        for i in range(min(num_true, num_detections)):  # near ones, and several for one
            boxes[i] = true_boxes[rng.integers(num_true)] + rng.integers(-1, 2, 4) * 0.25
        true_labels, labels = rng.integers(0, 3, num_true), rng.integers(0, 3, num_detections)
        difficult, scores = rng.random(num_true) < 0.3, rng.integers(1, 6, num_detections) / 6  # many equal scores
        counted.add(boxes, labels, scores, Objects(true_boxes, true_labels, difficult))
        for label, score, box in zip(labels, scores, boxes, strict=True):
            detections[label].append((image, score, box.astype(np.float64)))
        for label, box, hard in zip(true_labels, true_boxes, difficult, strict=True):
            true[label].append((image, box.astype(np.float64), bool(hard)))
    for threshold in IOU_THRESHOLDS:
        expected = [slow_detection_ap(detections[c], true[c], threshold) for c in range(3)]
        np.testing.assert_allclose(counted.ap(threshold), expected, atol=1e-12)


def one_image(boxes, scores, true_boxes, difficult=None, labels=None, true_labels=None):
    counted = Detections(2)
    boxes, true_boxes = np.array(boxes, np.float32).reshape(-1, 4), np.array(true_boxes, np.float32).reshape(-1, 4)
    counted.add(
        boxes,
        np.array(labels or [0] * len(boxes)),
        np.array(scores, np.float32),
        Objects(
            true_boxes,
            np.array(true_labels or [0] * len(true_boxes)),
            np.array(difficult or [False] * len(true_boxes)),
        ),
    )
    return counted


def test_boxes_by_hand():
    a, b = (0, 0, 10, 10), (20, 0, 30, 10)
    assert one_image([a, b], [0.9, 0.8], [a, b]).ap(0.95)[0].tolist() == [1.0, 1.0]
    assert np.isnan(one_image([a], [0.9], [a]).ap(0.5)[1]).all(), "a class that is not there"
    # the second box on one object is wrong, however good
    eleven, area = one_image([a, a, b], [0.9, 0.8, 0.7], [a, b]).ap(0.5)[0]
    assert area == pytest.approx((1 + 2 / 3) / 2) and eleven == pytest.approx((6 + 5 * 2 / 3) / 11)
    # on a difficult object neither right nor wrong, and it need not be found
    assert one_image([a, b, b], [0.9, 0.8, 0.7], [a, b], difficult=[False, True]).ap(0.5)[0].tolist() == [1.0, 1.0]
    # a box of another class finds nothing
    assert one_image([a], [0.9], [a], labels=[1]).ap(0.5)[0].tolist() == [0.0, 0.0]
    # exactly half is enough (the devkit's >=), just below is not
    half = (0, 0, 10, 5)
    assert one_image([half], [0.9], [a]).ap(0.5)[0, 1] == 1.0
    assert one_image([(0, 0, 10, 4.9)], [0.9], [a]).ap(0.5)[0, 1] == 0.0
    # it goes to the object that it overlaps most, though another one is free
    assert one_image([a, (0, 0, 10, 9)], [0.9, 0.8], [a, (0, 0, 10, 8.5)]).ap(0.5)[0, 1] == 1.0
    assert one_image([a, (0, 0, 10, 9.5)], [0.9, 0.8], [a, (0, 0, 10, 8.5)]).ap(0.5)[0, 1] == 0.5


# ------------------------------------------------------------------------------------------------------ masks


def test_confusion_and_iou_equal_sklearns():
    rng = np.random.default_rng(2)
    true, predicted = rng.integers(0, 5, (30, 20)), rng.integers(0, 5, (30, 20))
    counts = confusion(predicted, true, 5)
    np.testing.assert_array_equal(counts, confusion_matrix(true.ravel(), predicted.ravel()))
    np.testing.assert_allclose(class_iou(counts), jaccard_score(true.ravel(), predicted.ravel(), average=None))


def test_void_pixels_and_absent_classes():
    true = np.array([[0, 1, 255], [1, 255, 0]], np.uint8)
    predicted = np.array([[0, 1, 2], [0, 3, 0]])
    counts = confusion(predicted, true, 4)
    assert counts.sum() == 4 and counts[0].tolist() == [2, 0, 0, 0] and counts[1].tolist() == [1, 1, 0, 0]
    ious = class_iou(counts)
    assert ious[:2].tolist() == [2 / 3, 0.5] and np.isnan(ious[2:]).all()
    assert class_iou(confusion(true, true, 4))[:2].tolist() == [1.0, 1.0]
