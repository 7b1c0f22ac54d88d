"""Linear classifiers on features, and top-n, against numbers of the official codes (SFRIK, ReLIC): eval.npz."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist.evaluators import logistic, logistic_calibrated, logistic_sgd
from ssl_dist.results.accuracy import target_rank
from ssl_dist.storage.features import Features

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "eval.npz"))
LOSS, ACC1, ACC5, BEST1, BEST5 = range(1, 6)  # columns of the table of epochs
# The official accuracies are float32 sums of percents.
PERCENT = 1e-4


def _part(name):
    labels = GOLDEN[f"sfrik_logreg/{name}_labels"]
    classes = json.dumps([str(c) for c in range(len(GOLDEN["sfrik_logreg/init.bias"]))])
    features = GOLDEN[f"sfrik_logreg/{name}_features"]
    return Features(features, labels, np.arange(len(labels)), {"classes": classes}, name)


TRAIN, VALIDATION = _part("train"), _part("val")
CONFIG = json.loads(str(GOLDEN["sfrik_logreg/config"]))
OPTIONS = logistic_sgd.Options(
    batch_size=len(TRAIN), **{name: CONFIG[name] for name in ("epochs", "lr", "weight_decay", "momentum")}
)
INITIAL = tuple(torch.from_numpy(GOLDEN[f"sfrik_logreg/init.{name}"]) for name in ("weight", "bias"))


def _relative(actual, expected):
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def test_sfriks_logistic_regression():
    assert "full" in CONFIG["batch"]
    epochs = list(logistic_sgd.epochs(TRAIN, OPTIONS, *INITIAL))
    accuracies = np.array([logistic_sgd.accuracies(epoch, VALIDATION, 1 << 20) for epoch in epochs])
    for precision, tolerance in (("f64", 1e-9), ("f32", 1e-5)):
        table = GOLDEN[f"sfrik_logreg/{precision}/epoch_loss_acc1_acc5_best1_best5"]
        assert len(epochs) == len(table)
        assert _relative([epoch.loss for epoch in epochs], table[:, LOSS]) < tolerance
        assert _relative(epochs[-1].weights, GOLDEN[f"sfrik_logreg/{precision}/final.weight"]) < tolerance
        assert _relative(epochs[-1].biases, GOLDEN[f"sfrik_logreg/{precision}/final.bias"]) < tolerance
        np.testing.assert_allclose(accuracies, table[:, [ACC1, ACC5]], rtol=0, atol=PERCENT)
        best = np.maximum.accumulate(accuracies)
        np.testing.assert_allclose(best, table[:, [BEST1, BEST5]], rtol=0, atol=PERCENT)


def test_the_result_is_that_of_the_last_epoch(monkeypatch):
    monkeypatch.setattr(logistic_sgd, "initial", lambda *_: INITIAL)
    values = logistic_sgd.run(TRAIN, VALIDATION, OPTIONS)
    last = GOLDEN["sfrik_logreg/f64/epoch_loss_acc1_acc5_best1_best5"][-1]
    assert values["logistic_sgd_top1"] == pytest.approx(last[ACC1], abs=PERCENT)
    assert values["logistic_sgd_top5"] == pytest.approx(last[ACC5], abs=PERCENT)


def test_blocks_of_rows_change_nothing(monkeypatch):
    monkeypatch.setattr(logistic_sgd, "_rows_in", lambda *_: 7)
    epochs = list(logistic_sgd.epochs(TRAIN, OPTIONS, *INITIAL))
    assert _relative(epochs[-1].weights, GOLDEN["sfrik_logreg/f64/final.weight"]) < 1e-9
    table = GOLDEN["sfrik_logreg/f64/epoch_loss_acc1_acc5_best1_best5"]
    assert _relative([epoch.loss for epoch in epochs], table[:, LOSS]) < 1e-9


@pytest.mark.parametrize("key", sorted(key for key in GOLDEN if key.startswith("cosine_lr/")))
def test_rates(key):
    num_epochs, lr = re.fullmatch(r"cosine_lr/T(\d+)_lr([\d.]+)", key).groups()
    rates = [logistic_sgd.rate(float(lr), epoch, int(num_epochs)) for epoch in range(len(GOLDEN[key]))]
    assert _relative(rates, GOLDEN[key]) < 1e-9


def test_relics_calibrated_classifier():
    """The official number is scikit-learn's too, and depends on its version: 2 % are allowed for that."""
    values = logistic_calibrated.run(TRAIN, VALIDATION, logistic_calibrated.Options())
    official = (GOLDEN["relic_logreg/predictions"] == VALIDATION.labels).mean()
    assert official == pytest.approx(float(GOLDEN["relic_logreg/accuracy"]))
    assert values["logistic_calibrated_top1"] == pytest.approx(100 * official, abs=2)


def test_the_optimum_is_no_higher_than_what_sgd_found():
    """SFRIK's solution, taken as a point of our objective: the L-BFGS optimum must lie below it."""
    options = logistic.Options(standardize=False, c=1 / (len(TRAIN) * CONFIG["weight_decay"]))
    fitted = logistic.fit(TRAIN, options)
    weights = torch.from_numpy(GOLDEN["sfrik_logreg/f64/final.weight"]).double()
    biases = torch.from_numpy(GOLDEN["sfrik_logreg/f64/final.bias"]).double()
    logits = torch.from_numpy(TRAIN.features).double() @ weights.T + biases
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(TRAIN.labels), reduction="sum")
    assert fitted.objective < float(options.c * loss + (weights**2).sum() / 2)


def test_top_n():
    logits, targets = torch.from_numpy(GOLDEN["topk/logits"]), torch.from_numpy(GOLDEN["topk/target"])
    rank = target_rank(logits, targets)
    percent = [float((rank < top).double().mean()) * 100 for top in (1, 5)]
    np.testing.assert_allclose(percent, GOLDEN["topk/acc1_acc5_percent"], rtol=0, atol=PERCENT)
