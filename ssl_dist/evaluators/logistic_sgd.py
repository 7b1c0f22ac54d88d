"""Multinomial logistic regression by SGD: SFRIK's recipe for a linear classifier on features as they were extracted.

Mean cross entropy of mini-batches; SGD with momentum, weight decay on weights and biases; the rate of epoch e (from 0)
of E is lr (1 + cos(pi e / E)) / 2. The weights begin as draws of N(0, 0.01^2), the biases as 0. Every epoch sees every
training image once: the last batch may be smaller, and a batch as large as the training split makes it gradient
descent. Weights and order are functions of the seed, and all is computed in float64. On a GPU steps
round otherwise by 1e-16, which a convex loss does not let grow; with few classes their launches are most of their time.

The last epoch is the result. The official script logs the best accuracy over the epochs, chosen on the images that it
is measured on.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_dist.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from ssl_dist.device import CPU, to_device
from ssl_dist.errors import UserError
from ssl_dist.keys import INIT, ORDER, hash64, normals, permutation
from ssl_dist.results.accuracy import top1_and_top5
from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features, check_pair, require_labels

PROTOCOL = (
    "logistic regression by SGD on frozen features as extracted (SFRIK): {epochs} epochs, the last one counts, batches"
    " of {batch_size}, lr {lr} with a cosine per epoch, momentum {momentum}, weight decay {weight_decay}, seed {seed}"
)
VERSION = 1
_INITIAL_STD = 0.01


class Options(Section):
    epochs: PositiveInt = Field(100, description="passes over the training split")
    batch_size: PositiveInt = Field(256, description="images of a step; as many as there are, or more: all of them")
    lr: PositiveFloat = Field(0.3, description="learning rate of the first epoch (SFRIK's README: 0.4)")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    weight_decay: NonNegativeFloat = Field(1e-6, description="of weights and biases")
    seed: NonNegativeInt = Field(0, description="of the first weights and of the order of images")
    memory_mb: PositiveInt = Field(
        512, description="MiB for rows; a training file that fits in half of it is read once"
    )


@dataclass(frozen=True)
class Epoch:
    """The classifier after an epoch, weights float64 [C, D] and biases [C], and the mean loss of its images, each
    measured before the step that it took part in."""

    weights: Tensor
    biases: Tensor
    loss: float


def run(
    train: Features,
    test: Features,
    options: Options,
    writer: FigureWriter | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`logistic_sgd_top1`, `logistic_sgd_top5` and `logistic_sgd_train_top1` in percent, after the last epoch.

    Raises `UserError` for files that do not belong together, missing labels, fewer than two classes and a training
    that diverges.
    """
    check_pair(train, test)
    require_labels(train, test)
    last = deque(epochs(train, options, *initial(train, options.seed), device or CPU), maxlen=1).pop()
    memory = options.memory_mb << 20
    top1, top5 = accuracies(last, test, memory)
    train_top1, _ = accuracies(last, train, memory)
    return {"logistic_sgd_top1": top1, "logistic_sgd_top5": top5, "logistic_sgd_train_top1": train_top1}


def rate(lr: float, epoch: int, num_epochs: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    return lr * (1 + math.cos(math.pi * epoch / num_epochs)) / 2


def initial(train: Features, seed: int) -> tuple[Tensor, Tensor]:
    """The first weights float64 [C, D] and biases [C] of a classifier with an output for every class of the file."""
    num_classes = max(len(train.classes), int(train.labels.max()) + 1)
    draws = normals(hash64(seed, INIT), num_classes * train.dim)
    weights_CD = torch.from_numpy(draws.reshape(num_classes, train.dim)) * _INITIAL_STD
    return weights_CD, torch.zeros(num_classes, dtype=torch.float64)


def epochs(
    train: Features, options: Options, weights_CD: Tensor, biases_C: Tensor, device: torch.device = CPU
) -> Iterator[Epoch]:
    """The classifier after every epoch from these first weights, on the device. Raises `UserError` when the loss is
    not finite."""
    weights_CD, biases_C = (t.to(device).double().clone().requires_grad_() for t in (weights_CD, biases_C))
    optimizer = torch.optim.SGD(
        [weights_CD, biases_C], lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    memory = options.memory_mb << 20
    read = _reader(train, memory, device)
    num_rows = _rows_in(memory, train.dim, len(biases_C))
    for epoch in range(options.epochs):
        optimizer.param_groups[0]["lr"] = rate(options.lr, epoch, options.epochs)
        order_N = permutation(hash64(options.seed, ORDER, epoch), len(train))
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, len(train), options.batch_size):
            rows_B = np.sort(order_N[start : start + options.batch_size])  # a file is read in its own order
            optimizer.zero_grad()
            for rows_R in np.split(rows_B, range(num_rows, len(rows_B), num_rows)):
                logits_RC = read(rows_R).double() @ weights_CD.T + biases_C
                target_R = to_device(train.labels[rows_R], device)
                total = torch.nn.functional.cross_entropy(logits_RC, target_R, reduction="sum")
                (total / len(rows_B)).backward()
                loss += total.detach() / len(train)
            optimizer.step()
        if not math.isfinite(mean_loss := loss.item()):
            raise UserError(
                f"logistic_sgd.lr = {options.lr}: the loss of epoch {epoch + 1} is not finite; give a smaller rate"
            )
        yield Epoch(weights_CD.detach().clone(), biases_C.detach().clone(), mean_loss)


def accuracies(epoch: Epoch, part: Features, memory: int) -> tuple[float, float]:
    """Top-1 and top-5 in percent. A label that the classifier has no output for is wrong."""
    num_classes = len(epoch.biases)
    device = epoch.weights.device
    labels_N = torch.from_numpy(part.labels).to(device)
    target_N = labels_N.where(labels_N < num_classes, -1)
    step = _rows_in(memory, part.dim, num_classes)

    def scores_RC(start: int) -> Tensor:
        rows_RD = torch.from_numpy(part.rows(start, start + step)).to(device)
        return rows_RD.double() @ epoch.weights.T + epoch.biases

    return top1_and_top5((scores_RC(start), target_N[start : start + step]) for start in range(0, len(part), step))


def _reader(train: Features, memory: int, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """Rows on the device by their numbers, from its memory where the file fits in half of the budget, else from the
    file."""
    if len(train) * train.dim * 4 > memory // 2:
        return lambda rows: torch.from_numpy(train.take(rows)).to(device)
    rows_ND = torch.from_numpy(train.rows(0, len(train))).to(device)
    return lambda rows: rows_ND[to_device(rows, device)]


def _rows_in(memory: int, dim: int, num_classes: int) -> int:
    """Rows of a block: each as read and in float64; its scores with what they are compared by, or their gradients."""
    return max(1, memory // 2 // (dim * 12 + num_classes * 32))
