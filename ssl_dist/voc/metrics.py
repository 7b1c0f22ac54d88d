"""What VOC's devkit counts: average precision of rankings and of boxes, and intersection over union of masks.

The papers' detection numbers (MoCo, VICReg, ...) come from detectron2's VOC evaluator, which takes the devkit's rules
at ten thresholds; pycocotools has other rules (101 recalls, another assignment of boxes) and no 11-point precision. So
the devkit's rules are written out here.
"""

import numpy as np
import torch
from torchvision.ops import box_iou

from ssl_dist.results.confusion import matrix
from ssl_dist.voc.data import VOID, Objects

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))


def average_precision(hit_N: np.ndarray, num_positives: int) -> tuple[float, float]:
    """Average precision in [0, 1] of a ranking: by 11 points, and by area.

    hit_N: bool, best rank first, whether that rank is a positive; num_positives: how many there are, ranked or not.
    With p(r) the highest precision at any recall >= r: the mean of p(0), p(0.1), ..., p(1) (VOC2007, sec. 4.1 of the
    devkit), and the area below p (since VOC2010). Recall >= k / 10 is decided in integers. nan without positives.
    """
    if num_positives == 0:
        return np.nan, np.nan
    num_hits_N = np.cumsum(hit_N)
    precision_N = num_hits_N / np.arange(1, len(hit_N) + 1)
    highest_N = np.maximum.accumulate(precision_N[::-1])[::-1]
    first_K = np.searchsorted(10 * num_hits_N, np.arange(11) * num_positives)
    reached = first_K[first_K < len(hit_N)]
    return float(highest_N[reached].sum() / 11), float(highest_N[hit_N].sum() / num_positives)


def ranking(score_N: np.ndarray) -> np.ndarray:
    """Ranks to rows, best first; of equal scores the earlier row is first, as in the devkit."""
    return np.argsort(-score_N, kind="stable")


def classification_ap(score_N: np.ndarray, label_N: np.ndarray) -> tuple[float, float]:
    """Average precision (11 points, area) of one class. label_N: 1, -1, or 0 for images that do not count."""
    counted = label_N != 0
    positive_N = label_N[counted] > 0
    return average_precision(positive_N[ranking(score_N[counted])], int(positive_N.sum()))


def iou(boxes_N4: np.ndarray, others_M4: np.ndarray) -> np.ndarray:
    """Intersection over union [N, M] of boxes x0, y0, x1, y1, float64."""
    return box_iou(torch.from_numpy(boxes_N4).double(), torch.from_numpy(others_M4).double()).numpy()


class Detections:
    """Predicted boxes and true objects of a split, image by image."""

    def __init__(self, num_classes: int):
        # For each class: of every box found its score, highest IoU with a true box of its image, and that box's number
        # among all of the class (-1: the image has none); of every true box whether it is difficult.
        self._detected: list[tuple[list, list, list]] = [([], [], []) for _ in range(num_classes)]
        self._difficult: list[list[bool]] = [[] for _ in range(num_classes)]

    def add(self, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, true: Objects) -> None:
        """One image: the boxes, labels and scores found, [n, 4], [n] and [n], and what is truly there."""
        for label, (columns, difficult) in enumerate(zip(self._detected, self._difficult, strict=True)):
            of_class, true_of_class = labels == label, true.labels == label
            best, which = np.zeros(of_class.sum()), np.full(of_class.sum(), -1)
            if true_of_class.any() and of_class.any():
                overlap = iou(boxes[of_class], true.boxes[true_of_class])
                best, which = overlap.max(1), overlap.argmax(1) + len(difficult)
            for column, new in zip(columns, (scores[of_class], best, which), strict=True):
                column.extend(new)
            difficult.extend(true.difficult[true_of_class])

    def ap(self, threshold: float) -> np.ndarray:
        """Average precision by 11 points and area, [C, 2]; nan for a class without objects that count.

        In the order of scores each box goes to the true box of its class that it overlaps most. From `threshold` on
        it is right the first time, wrong every other time, and ignored where that one is difficult; below it is
        wrong (VOCevaldet of the devkit).
        """
        return np.array([self._ap(label, threshold) for label in range(len(self._detected))])

    def _ap(self, label: int, threshold: float) -> tuple[float, float]:
        difficult = np.array(self._difficult[label], np.bool_)
        score, best, which = (np.array(values) for values in self._detected[label])
        order = ranking(score)
        best, which = best[order], which[order].astype(np.int64)
        near = (best >= threshold) & (which >= 0)
        counted = np.ones(len(near), np.bool_)
        counted[near] = ~difficult[which[near]]
        near, which = near[counted], which[counted]
        hit = np.zeros(len(near), np.bool_)
        near_ranks = np.flatnonzero(near)
        _, first = np.unique(which[near_ranks], return_index=True)
        hit[near_ranks[first]] = True
        return average_precision(hit, int((~difficult).sum()))


def confusion(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C, C]: pixels of each true class (rows) by what was predicted (columns); void pixels do not count."""
    counted = true != VOID
    return matrix(true[counted].astype(np.int64), predicted[counted], num_classes)


def class_iou(confusion_CC: np.ndarray) -> np.ndarray:
    """Intersection over union of every class in [0, 1]; nan for one that is neither there nor predicted."""
    common = confusion_CC.diagonal()
    union = confusion_CC.sum(0) + confusion_CC.sum(1) - common
    return np.divide(common, union, out=np.full(len(common), np.nan), where=union > 0)
