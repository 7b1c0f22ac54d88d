"""Calibrated logistic regression: the linear evaluation of the ReLIC code, which is scikit-learn's own.

`CalibratedClassifierCV(LogisticRegression(max_iter=100))` on features as they were extracted: five folds; in each one a
logistic regression on four fifths (L-BFGS, L2, C = 1, at most 100 iterations, converged or not) and, on the other
fifth, a sigmoid for every class (Platt, 1999) that turns its scores into probabilities; the prediction is the mean over
the folds. A protocol of its own: the folds, the calibration and the early end all move the accuracy, so compare it with
ReLIC's numbers, and take `logistic` for how well a linear classifier can do on features. It stays on the CPU beside a
GPU, as scikit-learn does.
"""

import warnings

import numpy as np
import torch
from pydantic import Field

from ssl_dist.config import PositiveInt, Section
from ssl_dist.errors import UserError
from ssl_dist.results.accuracy import target_rank
from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features, check_pair, require_labels

PROTOCOL = (
    "calibrated logistic regression on frozen features as extracted (ReLIC): scikit-learn's CalibratedClassifierCV of"
    " LogisticRegression, {max_iter} iterations at most, mean of 5 folds"
)
VERSION = 1
_FOLDS = 5


class Options(Section):
    max_iter: PositiveInt = Field(100, description="L-BFGS iterations of each fold's regression; ReLIC: 100")
    memory_mb: PositiveInt = Field(4096, description="MiB; scikit-learn needs all rows at once, so more is refused")


def run(
    train: Features,
    test: Features,
    options: Options,
    writer: FigureWriter | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`logistic_calibrated_top1` and `logistic_calibrated_top5` in percent.

    Raises `UserError` for files that do not belong together, missing labels, fewer than two classes, a class with
    fewer than five images, and features that need more memory than `memory_mb`.
    """
    check_pair(train, test)
    require_labels(train, test)
    from sklearn.calibration import CalibratedClassifierCV  # scikit-learn takes a second
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    _require_memory(train, test, options)
    labels, counts = np.unique(train.labels, return_counts=True)
    if counts.min() < _FOLDS:
        raise UserError(
            f"logistic_calibrated: class {labels[counts.argmin()]} of {train.source} has {counts.min()} images, fewer"
            f" than its {_FOLDS} folds; use more images, or logistic"
        )
    model = CalibratedClassifierCV(LogisticRegression(max_iter=options.max_iter), cv=_FOLDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol ends there, converged or not
        model.fit(train.rows(0, len(train)), train.labels)
    probabilities_QC = torch.from_numpy(model.predict_proba(test.rows(0, len(test))))
    target_Q = np.searchsorted(model.classes_, test.labels)
    has_class_Q = model.classes_[np.minimum(target_Q, len(labels) - 1)] == test.labels
    rank_Q = target_rank(probabilities_QC, torch.from_numpy(np.where(has_class_Q, target_Q, -1)))
    return {f"logistic_calibrated_top{top}": float((rank_Q < top).double().mean()) * 100.0 for top in (1, 5)}


def _require_memory(train: Features, test: Features, options: Options) -> None:
    """All rows, a fold's copy of them and the solver's, and the scores of every class."""
    num_classes = len(np.unique(train.labels))
    needed = len(train) * (3 * 4 * train.dim + 4 * 8 * num_classes) + len(test) * (4 * test.dim + 16 * num_classes)
    if needed > options.memory_mb << 20:
        raise UserError(
            f"logistic_calibrated.memory_mb = {options.memory_mb}: {train.source} needs about {needed / 2**20:.0f} MiB,"
            " since scikit-learn holds all rows; raise it, or use logistic or logistic_sgd, which stream"
        )
