"""The evaluators of features on arrays of one's own: `ssl_dist.evaluate.knn(train, train_labels, test, test_labels)`.

Features are [N, D] in floating point, arrays or tensors; labels are whole numbers [N], 0 .. C - 1, -1 where unknown.
Values are by the names that `ssl-dist evaluate` gives them, accuracies in percent. Options are those of the evaluator,
see `ssl-dist keys knn`; device, as in "cuda", computes where the evaluator has something for a GPU. Raises `ValueError`
for arrays that are no features, `UserError` for wrong options and for what the evaluator cannot measure.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_dist import device as devices
from ssl_dist import evaluators
from ssl_dist.config import validate
from ssl_dist.storage.features import Features

Array = np.ndarray | Tensor
Labels = np.ndarray | Tensor | Sequence[int]
Device = torch.device | str | None

_MAX_CLASSES = 1_000_000


def knn(
    train: Array,
    train_labels: Labels,
    test: Array,
    test_labels: Labels,
    device: Device = None,
    **options: Any,
) -> dict[str, float]:
    """Weighted k-nearest neighbours by cosine: `knn20_top1`, ... for every k of the option `k`."""
    return _values("knn", train, train_labels, test, test_labels, device, options)


def logistic(
    train: Array,
    train_labels: Labels,
    test: Array,
    test_labels: Labels,
    device: Device = None,
    **options: Any,
) -> dict[str, float]:
    """Multinomial logistic regression, at its optimum: a linear probe of the features."""
    return _values("logistic", train, train_labels, test, test_labels, device, options)


def logistic_sgd(
    train: Array,
    train_labels: Labels,
    test: Array,
    test_labels: Labels,
    device: Device = None,
    **options: Any,
) -> dict[str, float]:
    """A linear classifier that stochastic gradient descent trains on the features, as papers' linear probes do."""
    return _values("logistic_sgd", train, train_labels, test, test_labels, device, options)


def retrieval(
    train: Array,
    train_labels: Labels,
    test: Array,
    test_labels: Labels,
    device: Device = None,
    **options: Any,
) -> dict[str, float]:
    """Test images as queries, training images as the gallery: mean average precision, recall, precision."""
    return _values("retrieval", train, train_labels, test, test_labels, device, options)


def clusters(
    train: Array,
    train_labels: Labels,
    test: Array,
    test_labels: Labels,
    device: Device = None,
    **options: Any,
) -> dict[str, float]:
    """k-means of the training images against their classes: purity, mutual information, accuracy after matching."""
    return _values("clusters", train, train_labels, test, test_labels, device, options)


def _values(
    name: str,
    train: Array,
    train_labels: Labels,
    test: Array,
    test_labels: Labels,
    device: Device,
    options: dict[str, Any],
) -> dict[str, float]:
    evaluator = evaluators.find(name)
    assert not isinstance(evaluator, evaluators.ImageEvaluator), "these measure features"
    chosen = validate(evaluator.Options, options, f"{name}.")
    parts = _features(train, train_labels, "train"), _features(test, test_labels, "test")
    return evaluator.run(*parts, chosen, None, None if device is None else devices.chosen(device))


def _features(features: Array, labels: Labels, what: str) -> Features:
    features = features.detach().cpu().float().numpy() if isinstance(features, Tensor) else np.asarray(features)
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not features.size:
        raise ValueError(f"{what}: {list(features.shape)} of {features.dtype}: give features [N, D] in floating point")
    if labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < -1:
        raise ValueError(
            f"{what}_labels: {list(labels.shape)} of {labels.dtype}: give whole numbers [{len(features)}], one for "
            "each row of the features, -1 where unknown"
        )
    if labels.max() >= _MAX_CLASSES:
        raise ValueError(
            f"{what}_labels: go up to {labels.max()}: number the classes from 0 on, as np.unique(labels, "
            "return_inverse=True) does"
        )
    metadata = {"classes": "[]", "split": what}
    rows = np.ascontiguousarray(features, np.float32)
    return Features(rows, labels.astype(np.int64), np.arange(len(rows)), metadata, f"{what} features")
