"""Logistic regression by SGD against a plain loop over batches, and what it promises: order, memory, last epoch."""

import json

import numpy as np
import pytest
import torch

from ssl_dist.errors import UserError
from ssl_dist.evaluators import logistic_sgd
from ssl_dist.evaluators.logistic_sgd import Options
from ssl_dist.keys import ORDER, hash64, permutation
from ssl_dist.storage.features import METADATA, Features, read_features, write_features


def part(features, labels, classes=()):
    labels = np.asarray(labels, np.int64)
    metadata = dict.fromkeys(METADATA, "x") | {"classes": json.dumps(list(classes))}
    return Features(np.asarray(features, np.float32), labels, np.arange(len(labels)), metadata, "the file")


def drawn(count, classes=4, dim=6, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    return part(centres[labels] + generator.standard_normal((count, dim)), labels)


def slow(train, options, weights, biases):
    """SGD with momentum and weight decay, written out."""
    parameters = np.concatenate([weights, biases[:, None]], 1)
    velocity = np.zeros_like(parameters)
    losses = []
    for epoch in range(options.epochs):
        order = permutation(hash64(options.seed, ORDER, epoch), len(train))
        lr = options.lr * (1 + np.cos(np.pi * epoch / options.epochs)) / 2
        loss = 0.0
        for start in range(0, len(train), options.batch_size):
            batch = order[start : start + options.batch_size]
            gradient = np.zeros_like(parameters)
            for row, label in zip(train.features[batch].astype(np.float64), train.labels[batch], strict=True):
                logits = parameters @ np.append(row, 1)
                p = np.exp(logits) / np.exp(logits).sum()
                loss -= np.log(p[label]) / len(train)
                p[label] -= 1
                gradient += np.outer(p, np.append(row, 1)) / len(batch)
            velocity = options.momentum * velocity + gradient + options.weight_decay * parameters
            parameters = parameters - lr * velocity
        losses.append(loss)
    return parameters[:, :-1], parameters[:, -1], losses


@pytest.mark.parametrize("batch_size", [10, 7, 30, 100])  # 30 divides by 10; 7 leaves a rest; all at once; more
def test_against_a_plain_loop(batch_size):
    train = drawn(30)
    options = Options(epochs=4, batch_size=batch_size, lr=0.5, momentum=0.8, weight_decay=0.05, seed=3)
    initial = logistic_sgd.initial(train, options.seed)
    weights, biases, losses = slow(train, options, *(tensor.numpy() for tensor in initial))
    *_, last = epochs = list(logistic_sgd.epochs(train, options, *initial))
    np.testing.assert_allclose(last.weights, weights, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last.biases, biases, rtol=0, atol=1e-12)
    np.testing.assert_allclose([epoch.loss for epoch in epochs], losses, rtol=1e-12)


def test_first_weights():
    weights, biases = logistic_sgd.initial(part(np.zeros((3, 400)), [0, 1, 6]), seed=0)
    assert weights.shape == (7, 400) and weights.dtype == torch.float64 and not biases.any()
    assert weights.std().item() == pytest.approx(0.01, rel=0.05) and abs(weights.mean().item()) < 5e-4
    named, _ = logistic_sgd.initial(part(np.zeros((3, 4)), [0, 1, 1], classes="abcdefghij"), seed=0)
    assert named.shape == (10, 4)
    assert not torch.equal(logistic_sgd.initial(drawn(5), 0)[0], logistic_sgd.initial(drawn(5), 1)[0])


def test_numbers_depend_on_the_seed_and_on_nothing_else():
    train, test = drawn(60), drawn(41, seed=1)
    values = logistic_sgd.run(train, test, Options(epochs=3, batch_size=8))
    torch.manual_seed(1)
    np.random.seed(1)
    assert logistic_sgd.run(train, test, Options(epochs=3, batch_size=8)) == values
    assert set(values) == {"logistic_sgd_top1", "logistic_sgd_top5", "logistic_sgd_train_top1"}
    first, second = (
        list(logistic_sgd.epochs(train, Options(epochs=1, batch_size=8, seed=seed), *logistic_sgd.initial(train, 0)))
        for seed in (0, 1)
    )
    assert not torch.equal(first[0].weights, second[0].weights), "the order of images is the seed's too"


def test_a_file_larger_than_the_budget_gives_the_same(tmp_path):
    train, test = drawn(20_000, dim=20), drawn(41, dim=20, seed=1)
    write_features(tmp_path / "f.safetensors", train.features, train.labels, train.image_ids, train.metadata)
    mapped = read_features(tmp_path / "f.safetensors")
    options = Options(epochs=1, batch_size=4096, memory_mb=1)
    assert logistic_sgd._rows_in(1 << 20, 20, 4) < 4096, "batches in several blocks"
    whole = list(logistic_sgd.epochs(train, Options(epochs=1, batch_size=4096), *logistic_sgd.initial(train, 0)))
    streamed = list(logistic_sgd.epochs(mapped, options, *logistic_sgd.initial(mapped, 0)))
    torch.testing.assert_close(streamed[0].weights, whole[0].weights, rtol=0, atol=1e-13)
    assert logistic_sgd.run(mapped, test, options) == logistic_sgd.run(train, test, Options(epochs=1, batch_size=4096))


def test_accuracies():
    epoch = logistic_sgd.Epoch(torch.eye(8).double(), torch.zeros(8).double(), 0.0)
    test = part(np.eye(8)[[0, 1, 2, 7, 7]], [0, 2, 2, 9, 4])
    # Zero everywhere but at one class: the others follow in the order of classes.
    assert logistic_sgd.accuracies(epoch, test, 1 << 20) == (40.0, 60.0)


def test_only_the_last_epoch_counts(monkeypatch):
    def three_epochs(*_):
        for biases in ([0, 0, 0, 9], [0, 0, 0, 0], [0, 0, 2, 2]):  # 25, 100 and 50 % right
            yield logistic_sgd.Epoch(torch.eye(4).double(), torch.tensor(biases).double(), 0.0)

    monkeypatch.setattr(logistic_sgd, "epochs", three_epochs)
    test = part(np.eye(4), [0, 1, 2, 3])
    assert logistic_sgd.run(test, test, Options())["logistic_sgd_top1"] == 50.0


def test_mistakes_are_refused():
    train = drawn(30)
    with pytest.raises(UserError, match=r"logistic_sgd\.lr = 1e\+200: the loss of epoch \d is not finite"):
        logistic_sgd.run(train, train, Options(lr=1e200, epochs=9))
    with pytest.raises(UserError, match="the file: 1 of 30 images have no label"):
        logistic_sgd.run(part(train.features, [-1, *train.labels[1:]]), train, Options())
    with pytest.raises(UserError, match="at least two classes"):
        logistic_sgd.run(part(train.features, [3] * 30), train, Options())
    with pytest.raises(UserError, match="do not belong together"):
        logistic_sgd.run(train, drawn(10, dim=7), Options())
