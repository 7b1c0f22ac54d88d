"""Weighted kNN against numbers of the official codes (SFRIK, DINO, self-label): tests/golden/knn.npz."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist.evaluators import knn
from ssl_dist.storage.features import Features

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "knn.npz"))
NUM_CLASSES = int(max(GOLDEN["train_labels"].max(), GOLDEN["test_labels"].max())) + 1
CASES = sorted(key.split("/")[0] for key in GOLDEN if key.endswith("f64/top1_top5"))
SELA_BATCH = 64  # of the official loader that fills the feature bank


def _part(features, labels, num_classes=0):
    metadata = {"classes": json.dumps([str(c) for c in range(num_classes)])}
    return Features(np.asarray(features), np.asarray(labels), np.arange(len(labels)), metadata)


TRAIN = _part(GOLDEN["train_features"], GOLDEN["train_labels"])
TEST = _part(GOLDEN["test_features"], GOLDEN["test_labels"])


def _numbers(case):
    return [float(n) if "." in n else int(n) for n in re.findall(r"\d+\.?\d*", case)]


def _neighbours(k, dtype):
    blocks = list(knn.neighbours(TRAIN, TEST, k, dtype, 1 << 20))
    return torch.cat([cosine for _, cosine, _ in blocks]), torch.cat([rows for _, _, rows in blocks])


def _votes(case, dtype):
    k, temperature = _numbers(case)
    cosine_QK, row_QK = _neighbours(k, dtype)
    return knn.votes(cosine_QK, torch.from_numpy(TRAIN.labels)[row_QK], temperature, NUM_CLASSES)


def test_the_fixture_has_cases():
    assert CASES and any("neighbour_indices" in key for key in GOLDEN) and any("sela_knn" in key for key in GOLDEN)


@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/f64/neighbour_indices" in GOLDEN])
def test_neighbours(case):
    cosine_QK, row_QK = _neighbours(_numbers(case)[0], torch.float64)
    np.testing.assert_array_equal(row_QK, GOLDEN[f"{case}/f64/neighbour_indices"])
    stored = GOLDEN[f"{case}/f64/neighbour_cosine"]
    # Where the fixture keeps float32, an error of 1e-9 is at most a change of the last bit.
    tolerance = 1e-9 if stored.dtype == np.float64 else 1e-9 + np.finfo(np.float32).eps / 2
    np.testing.assert_allclose(cosine_QK, stored, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_votes_and_predictions(case):
    votes_QC = _votes(case, torch.float64)
    expected = GOLDEN[f"{case}/f64/vote_weights"]
    np.testing.assert_allclose(votes_QC, expected, rtol=0, atol=1e-9 * expected.max())
    np.testing.assert_array_equal(votes_QC.argmax(1), GOLDEN[f"{case}/f64/predictions_top1"])
    if GOLDEN[f"{case}/f64/rel_margin_top2"] > 1e-4:  # else float32 may well decide otherwise
        np.testing.assert_array_equal(_votes(case, torch.float32).argmax(1), GOLDEN[f"{case}/f32/predictions_top1"])


@pytest.mark.parametrize("case", CASES)
def test_accuracies(case):
    k, temperature = _numbers(case)
    values = knn.run(TRAIN, TEST, knn.Options(k=[k], temperature=[temperature], precision="fp64"))
    top1, top5 = values.values()
    assert top1 == pytest.approx(GOLDEN[f"{case}/f64/top1_top5"][0], abs=1e-9)
    # The official sort leaves the order of classes without votes open; ours is one of the possible ones.
    lowest, highest = GOLDEN[f"{case}/f64/top5_min_max_over_tie_orders"]
    assert lowest - 1e-9 <= top5 <= highest + 1e-9


@pytest.mark.parametrize("key", sorted(key for key in GOLDEN if "_numclasses" in key))
def test_more_class_names_than_classes(key):
    k, temperature, num_classes = _numbers(key.split("/")[0])
    train = _part(TRAIN.features, TRAIN.labels, num_classes)
    top1, top5 = knn.run(train, TEST, knn.Options(k=[k], temperature=[temperature], precision="fp64")).values()
    assert top1 == pytest.approx(GOLDEN[key][0], abs=1e-9)
    lowest, highest = GOLDEN[f"k{k}_T{temperature}/f64/top5_min_max_over_tie_orders"]
    assert lowest - 1e-9 <= top5 <= highest + 1e-9


def test_fewer_than_100_test_images():
    """There the official code fails (range with step 0)."""
    assert "must not be zero" in str(GOLDEN["fact_fewer_than_100_test_images"])
    count = min(99, len(TEST))
    case = CASES[-1]
    k, temperature = _numbers(case)
    right = GOLDEN[f"{case}/f64/predictions_top1"][:count] == TEST.labels[:count]
    few = _part(TEST.features[:count], TEST.labels[:count])
    values = knn.run(TRAIN, few, knn.Options(k=[k], temperature=[temperature], precision="fp64"))
    assert next(iter(values.values())) == pytest.approx(100 * right.mean(), abs=1e-9)


def _sela(variant):
    prefix = f"sela_knn/{variant}/"
    for key in sorted(GOLDEN):
        if key.startswith(prefix) and key.endswith("top1_fraction"):
            k, sigma = _numbers(key.split("/")[2])
            yield k, sigma, float(GOLDEN[key])


def _top1_fraction(train, k, sigma):
    return next(iter(knn.run(train, TEST, knn.Options(k=[k], temperature=[sigma], precision="fp64")).values())) / 100


def _slow_top1_fraction(train, k, sigma):
    """One image at a time, from the definition."""
    bank = train.features / np.linalg.norm(train.features.astype(np.float64), axis=1, keepdims=True)
    right = 0
    for row, label in zip(TEST.features.astype(np.float64), TEST.labels, strict=True):
        cosine = bank @ (row / np.linalg.norm(row))
        votes = np.zeros(NUM_CLASSES)
        for nearest in np.argsort(-cosine, kind="stable")[:k]:
            votes[train.labels[nearest]] += np.exp(cosine[nearest] / sigma)
        right += votes.argmax() == label
    return right / len(TEST)


def test_self_label_where_batches_are_whole():
    count = int(GOLDEN["sela_knn/aligned/n_train_used"])
    assert count % SELA_BATCH == 0
    train = _part(TRAIN.features[:count], TRAIN.labels[:count])
    for k, sigma, official in _sela("aligned"):
        assert _top1_fraction(train, k, sigma) == pytest.approx(official, abs=1e-12)


def test_self_label_where_the_last_batch_is_smaller():
    """The official code writes a smaller last batch at (its number) * (its own size): over rows of earlier images,
    leaving its own rows zero. With a bank spoilt that way we get its numbers; with the right one, the right numbers."""
    count = int(GOLDEN["sela_knn/unaligned/n_train_used"])
    assert count % SELA_BATCH
    features, labels = TRAIN.features[:count], TRAIN.labels[:count]
    last = count - count % SELA_BATCH
    misplaced = last // SELA_BATCH * (count - last)
    spoilt = features.copy()
    spoilt[last:] = 0
    spoilt[misplaced : misplaced + count - last] = features[last:]
    for k, sigma, official in _sela("unaligned"):
        assert _top1_fraction(_part(spoilt, labels), k, sigma) == pytest.approx(official, abs=1e-12)
        right = _part(features, labels)
        assert _top1_fraction(right, k, sigma) == pytest.approx(_slow_top1_fraction(right, k, sigma), abs=1e-12)
