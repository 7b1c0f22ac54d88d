"""ReLIC's calibrated classifier: scikit-learn's own numbers, and what is refused."""

import re
import warnings

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression

from ssl_dist.errors import UserError
from ssl_dist.evaluators import logistic_calibrated
from ssl_dist.evaluators.logistic_calibrated import Options
from tests.test_logistic_sgd import drawn, part


@pytest.mark.parametrize("classes", [2, 7])
def test_it_is_scikit_learns(classes):
    train, test = drawn(200, classes, dim=40), drawn(1001, classes, dim=40, seed=1)
    scales = np.exp(-0.3 * np.arange(40))  # so that the penalty and the early end matter
    names = np.array([1, 2, 4, 5, 7, 8, 9])
    train, test = part(train.features * scales, names[train.labels]), part(test.features * scales, names[test.labels])
    warnings.simplefilter("ignore")
    model = CalibratedClassifierCV(LogisticRegression(max_iter=5)).fit(train.features, train.labels)
    values = logistic_calibrated.run(train, test, Options(max_iter=5))
    assert values["logistic_calibrated_top1"] == pytest.approx(100 * model.score(test.features, test.labels))
    best = model.classes_[np.argsort(-model.predict_proba(test.features), 1, "stable")[:, :5]]
    assert values["logistic_calibrated_top5"] == pytest.approx(100 * (best == test.labels[:, None]).any(1).mean())


def test_an_end_before_the_optimum_is_the_protocol(recwarn):
    train = drawn(100)
    logistic_calibrated.run(train, train, Options(max_iter=1))
    assert not recwarn.list


def test_a_class_that_the_training_split_lacks_is_wrong():
    train = drawn(100, classes=2)
    values = logistic_calibrated.run(train, part(train.features, np.where(train.labels == 0, 0, 7)), Options())
    assert values["logistic_calibrated_top5"] == pytest.approx(100 * (train.labels == 0).mean())


def test_mistakes_are_refused():
    train = drawn(100)
    few = part(train.features[:44], [*[0] * 20, *[1] * 20, *[5] * 4])
    with pytest.raises(UserError, match="class 5 of the file has 4 images, fewer than its 5 folds"):
        logistic_calibrated.run(few, train, Options())
    large = drawn(20_000, dim=20)
    with pytest.raises(UserError, match=r"logistic_calibrated\.memory_mb = 1: the file needs about \d+ MiB") as caught:
        logistic_calibrated.run(large, large, Options(memory_mb=1))
    needed_mib = int(re.search(r"about (\d+) MiB", str(caught.value))[1])
    assert logistic_calibrated.run(large, large, Options(memory_mb=needed_mib + 1, max_iter=1))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="at least two classes"):
        logistic_calibrated.run(part(train.features, [3] * 100), train, Options())
