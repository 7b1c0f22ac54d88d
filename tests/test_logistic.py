"""Logistic regression against scikit-learn's optimum, and what it reports of its convergence."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ssl_dist import backbones
from ssl_dist.errors import UserError
from ssl_dist.evaluators import logistic
from ssl_dist.storage.features import Features


def part(features, labels):
    labels = np.asarray(labels, np.int64)
    return Features(np.asarray(features, np.float32), labels, np.arange(len(labels)), {}, "the file")


def correlated(count, dim=12, classes=4, seed=0):
    """Features as networks give them: correlated, of different scales, off centre; classes that overlap."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = np.random.default_rng(99).standard_normal((classes, dim)) * 0.5
    mixing = np.random.default_rng(98).standard_normal((dim, dim)) * np.exp(-0.4 * np.arange(dim))[:, None]
    return part((centres[labels] + generator.standard_normal((count, dim))) @ mixing + 2, labels)


def sklearns_optimum(train, c, standardize):
    features = train.features.astype(np.float64)
    if standardize:
        std = features.std(0)
        features = (features - features.mean(0)) / np.where(std > 1e-9, std, 1)
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, solver="newton-cg").fit(features, train.labels)
    log_p = model.predict_log_proba(features)[np.arange(len(train)), np.searchsorted(model.classes_, train.labels)]
    return -c * log_p.sum() + 0.5 * (model.coef_**2).sum(), model


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_objective_is_scikit_learns_optimum(classes, c, standardize):
    train = correlated(300, classes=classes)
    fit = logistic.fit(train, logistic.Options(c=c, standardize=standardize))
    objective, model = sklearns_optimum(train, c, standardize)
    assert fit.converged
    assert fit.objective == pytest.approx(objective, rel=1e-6)
    features = (train.features - fit.mean.numpy()) / fit.scale.numpy()
    logits = features @ fit.weights[:, :-1].numpy().T + fit.weights[:, -1].numpy()
    ours = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = model.predict_proba((train.features - fit.mean.numpy()) / fit.scale.numpy())
    np.testing.assert_allclose(ours, expected, atol=5e-3)


@pytest.fixture(scope="module")
def untrained_features():
    """Features of an untrained conv4: all of one sign, nearly the same for every image."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images[:600].reshape(-1, 1, 8, 8) / 16).float()
    pixels = torch.nn.functional.interpolate(pixels.expand(-1, 3, 8, 8), size=32, mode="bilinear")
    torch.manual_seed(0)
    with torch.inference_mode():
        features = backbones.build("conv4").eval()(pixels)
    return part(features.numpy(), labels[:600])


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("c", [0.1, 1000.0])
def test_ill_conditioned_features_of_a_network(untrained_features, c, standardize):
    train = untrained_features
    moments = train.features.astype(np.float64).T @ train.features
    assert np.linalg.cond(moments) > 1e6
    fit = logistic.fit(train, logistic.Options(c=c, standardize=standardize))
    assert fit.converged
    assert fit.objective == pytest.approx(sklearns_optimum(train, c, standardize)[0], rel=1e-6)


def test_accuracies_of_labels_with_gaps():
    train, test = correlated(300), correlated(151, seed=1)
    names = np.array([1, 4, 5, 9])
    train, test = part(train.features, names[train.labels]), part(test.features, names[test.labels])
    _, model = sklearns_optimum(train, 1.0, True)
    mean, std = train.features.mean(0, dtype=np.float64), train.features.astype(np.float64).std(0)
    values = logistic.run(train, test, logistic.Options())
    assert values["logistic_top1"] == pytest.approx(100 * model.score((test.features - mean) / std, test.labels))
    assert values["logistic_train_top1"] == pytest.approx(
        100 * model.score((train.features - mean) / std, train.labels)
    )
    assert values["logistic_top5"] == 100.0 and values["logistic_converged"] == 1.0


def test_top5_is_counted_among_more_than_five_classes():
    train, test = correlated(600, classes=9), correlated(200, classes=9, seed=1)
    _, model = sklearns_optimum(train, 1.0, True)
    mean, std = train.features.mean(0, dtype=np.float64), train.features.astype(np.float64).std(0)
    best = np.argsort(-model.decision_function((test.features - mean) / std), axis=1)[:, :5]
    expected = 100 * (best == test.labels[:, None]).any(1).mean()
    assert 50 < expected < 100
    assert logistic.run(train, test, logistic.Options())["logistic_top5"] == pytest.approx(expected)


def test_streaming_changes_nothing(monkeypatch):
    train, test = correlated(300), correlated(151, seed=1)
    whole, values = logistic.fit(train, logistic.Options()), logistic.run(train, test, logistic.Options())
    monkeypatch.setattr(
        logistic, "_ranges", lambda part, *_: [(s, min(s + 7, len(part))) for s in range(0, len(part), 7)]
    )
    monkeypatch.setattr(logistic, "_fits", lambda *_: False)
    streamed = logistic.fit(train, logistic.Options())
    assert streamed.objective == pytest.approx(whole.objective, rel=1e-9)
    assert logistic.run(train, test, logistic.Options()) == values


@pytest.mark.parametrize("standardize", [True, False])
def test_dead_and_repeated_channels(standardize):
    features, labels = correlated(200).features, correlated(200).labels
    spoilt = np.concatenate([features, features[:, :3], np.zeros((200, 2)), np.full((200, 1), 0.1)], 1)
    train = part(spoilt, labels)
    fit = logistic.fit(train, logistic.Options(standardize=standardize))
    assert fit.converged
    assert fit.objective == pytest.approx(sklearns_optimum(train, 1.0, standardize)[0], rel=1e-6)


def test_a_penalty_too_small_to_tell_repeated_channels_apart():
    train = correlated(200)
    repeated = part(np.concatenate([train.features] * 8, 1), train.labels)
    assert logistic.fit(repeated, logistic.Options(c=1e18, max_iter=20)).objective > 0


def test_the_fit_is_the_point_that_was_returned(monkeypatch):
    """After a failed line search L-BFGS returns an earlier point than the one it tried last."""

    def tries_one_returns_another(function, start, **_):
        function(start + 1)
        return SimpleNamespace(x=start, nit=1)

    monkeypatch.setattr("scipy.optimize.minimize", tries_one_returns_another)
    fit = logistic.fit(correlated(300), logistic.Options())
    assert not fit.weights.any() and fit.objective == pytest.approx(300 * np.log(4))


def test_separable_classes():
    train = part(np.repeat(np.eye(3) * 5, 10, 0), np.repeat([0, 1, 2], 10))
    fit = logistic.fit(train, logistic.Options(c=1e4))
    assert fit.converged and fit.objective == pytest.approx(sklearns_optimum(train, 1e4, True)[0], rel=1e-6)


def test_correlation_costs_few_passes():
    """Plain L-BFGS needs hundreds of iterations here."""
    assert logistic.fit(correlated(500, dim=30), logistic.Options(c=100.0)).iterations < 80


def test_the_gap_is_a_bound_and_an_early_end_is_reported(caplog):
    train = correlated(300)
    best = logistic.fit(train, logistic.Options(tolerance=1e-12)).objective
    for iterations in (1, 3, 6, 12):
        options = logistic.Options(max_iter=iterations, tolerance=1e-10)
        early = logistic.fit(train, options)
        assert not early.converged and early.iterations == iterations
        assert 0 <= (early.objective - best) / early.objective <= early.gap
    with caplog.at_level(logging.WARNING):
        assert logistic.run(train, train, options)["logistic_converged"] == 0.0
    assert "NOT CONVERGED after 12 iterations" in caplog.text and "logistic.max_iter=48" in caplog.text


def test_a_class_that_the_training_split_lacks_is_wrong():
    train = correlated(300, classes=2)
    test = part(train.features, np.where(np.arange(300) < 150, train.labels, 7))
    right = logistic.fit(train, logistic.Options())
    assert right.labels.tolist() == [0, 1]
    values = logistic.run(train, test, logistic.Options())
    assert values["logistic_top1"] <= values["logistic_top5"] == 50.0


def test_labels_and_files_must_fit():
    train = correlated(30)
    with pytest.raises(UserError, match="the file: 1 of 30 images have no label"):
        logistic.run(part(train.features, [-1, *train.labels[1:]]), train, logistic.Options())
    with pytest.raises(UserError, match="at least two classes"):
        logistic.run(part(train.features, [3] * 30), train, logistic.Options())
    with pytest.raises(UserError, match="do not belong together"):
        logistic.run(train, correlated(10, dim=7), logistic.Options())
