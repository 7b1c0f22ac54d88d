"""`ssl_dist.evaluate.knn` and its like on arrays."""

import json

import numpy as np
import pytest
import torch

import ssl_dist
from ssl_dist import evaluators
from ssl_dist.errors import UserError
from ssl_dist.storage.features import Features

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 120)
ROWS = RNG.standard_normal((120, 8)) + 2 * np.eye(4, 8)[LABELS]
ARRAYS = ROWS[:80], LABELS[:80], ROWS[80:], LABELS[80:]
OPTIONS = {
    "knn": {"k": [5], "precision": "fp64"}, "logistic": {}, "logistic_sgd": {"epochs": 2}, "retrieval": {},
    "clusters": {},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_values_are_the_evaluators(name):
    def part(rows, labels):
        metadata = {"classes": json.dumps([]), "split": "x"}
        return Features(rows.astype(np.float32), labels, np.arange(len(rows)), metadata, "the file")

    evaluator = evaluators.find(name)
    expected = evaluator.run(part(*ARRAYS[:2]), part(*ARRAYS[2:]), evaluator.Options(**OPTIONS[name]))
    measure = getattr(ssl_dist.evaluate, name)
    assert measure(*ARRAYS, **OPTIONS[name]) == expected
    assert measure(*map(torch.tensor, ARRAYS), device="cpu", **OPTIONS[name]) == expected


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((ROWS[0], LABELS), {}, ValueError, r"train: \[8\] of float64: give features \[N, D\]"),
        ((LABELS[:, None], LABELS), {}, ValueError, "train: .* of int64: give features"),
        ((ROWS, LABELS[:5]), {}, ValueError, r"train_labels: \[5\] of int64: give whole numbers \[120\]"),
        ((ROWS, LABELS / 2), {}, ValueError, "train_labels: .* of float64"),
        ((ROWS, LABELS), {"k": [500]}, UserError, "knn.k = 500"),
        ((ROWS, LABELS), {"kk": 5}, UserError, "knn.kk"),
        ((np.full((120, 8), np.nan), LABELS), {"k": [5]}, UserError, "not finite"),
        ((ROWS, np.full(120, -1)), {"k": [5]}, UserError, "no label"),
        ((ROWS, LABELS + 10**12), {"k": [5]}, ValueError, "train_labels: go up to 1000000000003: number the classes"),
        ((ROWS, LABELS), {"device": "gpu"}, UserError, "device = 'gpu': .*; cpu is always there"),
        ((ROWS, LABELS), {"device": f"cuda:{torch.cuda.device_count()}"}, UserError, "device = 'cuda:"),
    ],
)
def test_mistakes(arrays, options, error, message):
    with pytest.raises(error, match=message):
        ssl_dist.evaluate.knn(*arrays, *ARRAYS[2:], **options)
