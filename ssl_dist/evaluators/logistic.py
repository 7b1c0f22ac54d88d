"""Multinomial logistic regression at its optimum: how well a linear classifier can do on frozen features.

The objective is scikit-learn's `LogisticRegression(C)`: with x a row of features (standardised by the training split's
mean and standard deviation),
    F(W, b) = C sum_n -log softmax(W x_n + b)[y_n] + 1/2 |W|^2,     intercepts b unpenalised;
for two classes one weight vector serves both, as there. Solved by L-BFGS in float64, streaming over the file.

Features of a network are strongly correlated, which makes plain L-BFGS crawl. So it works in the variables in which
the Hessian at W = 0 is about the identity (a Cholesky factor of the features' second moments): 20 times fewer passes.

F is convex with curvature at least 1 in W, hence F - min F <= 1/2 |dF/dW|^2 (intercepts at their best). That bound,
relative to F, is what `tolerance` is compared with: the result does not depend on when an optimizer gave up. On a
GPU F and its gradient are computed in float64, too, and held to the same bound: both objectives are within `tolerance`
of the minimum and so of one another, and the weights W within sqrt(8 tolerance F), as the curvature is at least 1.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_dist.config import PositiveFloat, PositiveInt, Section
from ssl_dist.device import CPU
from ssl_dist.results.accuracy import top1_and_top5
from ssl_dist.results.confusion import add_pictures, class_names
from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features, check_pair, require_labels

PROTOCOL = "multinomial logistic regression on frozen features, at its optimum: L2, C={c}, standardize={standardize}"
VERSION = 1
DRAWS = True


class Options(Section):
    c: PositiveFloat = Field(1.0, description="scikit-learn's C, the weight of the losses against the L2 penalty")
    standardize: bool = Field(True, description="features to mean 0 and deviation 1 over the training split")
    tolerance: PositiveFloat = Field(1e-7, description="bound on the objective's relative distance from its minimum")
    max_iter: PositiveInt = Field(1000, description="L-BFGS iterations, after which it counts as not converged")
    memory_mb: PositiveInt = Field(
        512, description="MiB for blocks of rows; a file that fits in half of it is read once"
    )


@dataclass(frozen=True)
class Fit:
    """weights float64 [C, D + 1] of standardised features, the intercept last; mean and scale float64 [D]; these on the
    device. labels int64 [C], the label of each row. objective: F; gap: the bound on its relative distance from the
    minimum."""

    weights: Tensor
    mean: Tensor
    scale: Tensor
    labels: Tensor
    objective: float
    gap: float
    iterations: int
    converged: bool


def run(
    train: Features,
    test: Features,
    options: Options,
    writer: FigureWriter | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`logistic_top1`, `logistic_top5`, `logistic_train_top1` in percent, and `logistic_converged`, 1 or 0.

    A class that the training split lacks is never predicted. Raises `UserError` for files that do not belong together,
    missing labels and fewer than two classes.
    """
    check_pair(train, test)
    require_labels(train, test)
    fitted = fit(train, options, device or CPU)
    if not fitted.converged:
        logging.getLogger(__name__).warning(
            "logistic: NOT CONVERGED after %d iterations: the objective may be %.1g (relative) above its minimum, asked"
            " for %.1g; give logistic.max_iter=%d or a smaller logistic.c",
            fitted.iterations, fitted.gap, options.tolerance, 4 * options.max_iter,
        )  # fmt: skip
    top1, top5 = _accuracies(fitted, test, options.memory_mb << 20)
    train_top1, _ = _accuracies(fitted, train, options.memory_mb << 20)
    if writer is not None:
        predicted_N = _predicted(fitted, test, options.memory_mb << 20)
        add_pictures(writer, test, class_names(test, train), predicted_N, "logistic", "logistic regression")
    return {
        "logistic_top1": top1,
        "logistic_top5": top5,
        "logistic_train_top1": train_top1,
        "logistic_converged": float(fitted.converged),
    }


def fit(train: Features, options: Options, device: torch.device = CPU) -> Fit:
    """The minimum of F over the training split. L-BFGS itself runs on the host, F and its gradient on the device."""
    labels, target_N = np.unique(train.labels, return_inverse=True)
    num_free = len(labels) if len(labels) > 2 else 1  # two classes: the first one's row stays zero
    problem = _Problem(train, torch.from_numpy(target_N).to(device), len(labels), options)
    weights_FE, value, gap = torch.empty(0), np.inf, np.inf  # of the last point that was tried

    def value_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal weights_FE, value, gap
        weights_FE = problem.from_preconditioned(torch.from_numpy(theta.reshape(num_free, -1)).to(device))
        value, gradient_FE = problem.mean_objective(weights_FE)
        # In F's own scale the bound is |dF/dW|^2 / 2; F is this mean times CN.
        gap = float((gradient_FE**2).sum()) * problem.scale / 2 / value
        return value, problem.to_preconditioned(gradient_FE).cpu().numpy().ravel()

    def stop_at_tolerance(_: np.ndarray) -> None:
        if gap <= options.tolerance:
            raise StopIteration

    from scipy.optimize import minimize  # takes a third of a second

    result = minimize(
        value_and_gradient,
        np.zeros(num_free * (train.dim + 1)),
        jac=True,
        method="L-BFGS-B",
        callback=stop_at_tolerance,
        options={"maxiter": options.max_iter, "maxfun": 20 * options.max_iter, "ftol": 0.0, "gtol": 0.0},
    )
    value_and_gradient(result.x)  # the last point tried need not be the one returned
    weights_CE = torch.cat([torch.zeros_like(weights_FE), weights_FE]) if num_free == 1 else weights_FE
    return Fit(
        weights_CE, problem.mean_D, problem.scale_D, torch.from_numpy(labels),
        value * problem.scale, gap, int(result.nit), gap <= options.tolerance,
    )  # fmt: skip


class _Problem:
    """F / (C N) and its gradient over the rows of a file, on the device of `target_N`; E = D + 1, the last column being
    the constant 1."""

    def __init__(self, train: Features, target_N: Tensor, num_classes: int, options: Options):
        self.train, self.target_N, self.num_classes = train, target_N, num_classes
        self.scale = options.c * len(train)
        self.memory = options.memory_mb << 20
        self.cached: list[tuple[Tensor, Tensor]] | None = None
        self.device = target_N.device
        zeros_D = torch.zeros(train.dim, dtype=torch.float64, device=self.device)
        self.mean_D, self.scale_D = zeros_D, torch.ones_like(zeros_D)
        if options.standardize:
            self.mean_D = sum((rows_RD.sum(0) for rows_RD in self._raw()), start=zeros_D) / len(train)
            squares = (((rows_RD - self.mean_D) ** 2).sum(0) for rows_RD in self._raw())
            variance_D = sum(squares, start=zeros_D) / len(train)
            constant_D = variance_D <= (1e-12 * self.mean_D) ** 2
            self.scale_D = variance_D.sqrt().masked_fill(constant_D, 1.0)
        if _fits(train, self.memory):
            self.cached = list(self._blocks())
        self.factor_EE = self._preconditioner()

    def _raw(self) -> Iterator[Tensor]:
        for start, stop in _ranges(self.train, self.num_classes, self.memory):
            yield torch.from_numpy(self.train.rows(start, stop)).to(self.device).double()

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.cached is not None:
            yield from self.cached
            return
        for start, stop in _ranges(self.train, self.num_classes, self.memory):
            yield _standardised(self.train, start, stop, self.mean_D, self.scale_D), self.target_N[start:stop]

    def _preconditioner(self) -> Tensor:
        """Lower Cholesky factor of about the Hessian of F / (C N) at W = 0 for one class."""
        moments_EE = self.mean_D.new_zeros(self.train.dim + 1, self.train.dim + 1)
        for rows_RE, _ in self._blocks():
            moments_EE += rows_RE.T @ rows_RE
        moments_EE /= len(self.train)
        moments_EE *= (1 - 1 / self.num_classes) / self.num_classes
        diagonal_E = moments_EE.diagonal()
        diagonal_E += 1e-10 * diagonal_E.max()  # dead and duplicated channels, whatever C
        diagonal_E[:-1] += 1 / self.scale
        return torch.linalg.cholesky(moments_EE)

    def from_preconditioned(self, variables_FE: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor_EE, variables_FE, upper=False, left=False)

    def to_preconditioned(self, gradient_FE: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor_EE.T, gradient_FE, upper=True, left=False)

    def mean_objective(self, weights_FE: Tensor) -> tuple[float, Tensor]:
        """F / (C N) and its gradient [F, E], where F counts the free rows: all classes, or one of two."""
        penalised_FE = weights_FE.clone()
        penalised_FE[:, -1] = 0
        loss, gradient_FE = 0.0, torch.zeros_like(weights_FE)
        for rows_RE, target_R in self._blocks():
            logits_RC = _logits(rows_RE, weights_FE)
            log_p_RC = logits_RC.log_softmax(1)
            loss -= float(log_p_RC.gather(1, target_R[:, None]).sum())
            error_RC = log_p_RC.exp_().scatter_add_(1, target_R[:, None], log_p_RC.new_full((len(target_R), 1), -1.0))
            gradient_FE += error_RC[:, -len(weights_FE) :].T @ rows_RE
        value = loss / len(self.train) + float((penalised_FE**2).sum()) / 2 / self.scale
        return value, gradient_FE / len(self.train) + penalised_FE / self.scale


def _logits(rows_RE: Tensor, weights_FE: Tensor) -> Tensor:
    logits_RF = rows_RE @ weights_FE.T
    return logits_RF if logits_RF.shape[1] > 1 else torch.nn.functional.pad(logits_RF, (1, 0))


def _standardised(part: Features, start: int, stop: int, mean_D: Tensor, scale_D: Tensor) -> Tensor:
    """Rows float64 [R, D + 1], the last column 1."""
    rows_RE = mean_D.new_ones(stop - start, part.dim + 1)
    torch.sub(torch.from_numpy(part.rows(start, stop)).to(mean_D.device), mean_D, out=rows_RE[:, :-1])
    rows_RE[:, :-1] /= scale_D
    return rows_RE


def _fits(part: Features, memory: int) -> bool:
    return len(part) * (part.dim + 1) * 8 <= memory // 2


def _ranges(part: Features, num_classes: int, memory: int) -> Iterator[tuple[int, int]]:
    # A row as read, in float64 and once more in between; its logits, probabilities and what they are made of.
    step = max(1, memory // 2 // (part.dim * 24 + num_classes * 32))
    for start in range(0, len(part), step):
        yield start, min(start + step, len(part))


def _logit_blocks(fitted: Fit, part: Features, memory: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each block, and their logits."""
    for start, stop in _ranges(part, len(fitted.labels), memory):
        rows_RE = _standardised(part, start, stop, fitted.mean, fitted.scale)
        yield slice(start, stop), rows_RE @ fitted.weights.T


def _accuracies(fitted: Fit, part: Features, memory: int) -> tuple[float, float]:
    """Top-1 and top-5 in percent."""
    index_of = {int(label): i for i, label in enumerate(fitted.labels)}
    target_N = torch.tensor([index_of.get(label, -1) for label in part.labels.tolist()], device=fitted.weights.device)
    return top1_and_top5((logits_RC, target_N[rows]) for rows, logits_RC in _logit_blocks(fitted, part, memory))


def _predicted(fitted: Fit, part: Features, memory: int) -> np.ndarray:
    """The label of every row, int64 [N]; of equal logits the lower."""
    best = [logits_RC.argmax(1).cpu().numpy() for _, logits_RC in _logit_blocks(fitted, part, memory)]
    return fitted.labels.numpy()[np.concatenate(best)]
