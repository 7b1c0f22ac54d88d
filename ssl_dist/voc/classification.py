"""Classification: a linear SVM for every class on frozen features, mean average precision (Goyal et al. 2019).

Features of each image, squeezed to a square as in the paper's code and VISSL, L2-normalised; LIBLINEAR's squared hinge
with L2 penalty, positives weighted twice, its cost chosen for each class among 26 by the average precision of three
folds of the training split. Images in which a class is only "difficult" are negatives in training, and do not count in
the test, as in that code, whose mean average precision is the one by area. The primal problem is solved (dual=False):
its minimum is the same and the solver draws no random numbers.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize

from ssl_dist.errors import UserError, first_line, quoted
from ssl_dist.progress import Progress
from ssl_dist.storage.features import Features, read_features, write_features
from ssl_dist.voc.data import CLASSES, Sample, Split, normalized
from ssl_dist.voc.loop import read_ahead
from ssl_dist.voc.metrics import classification_ap
from ssl_dist.voc.options import OUTPUT
from ssl_dist.voc.options import ClassificationOptions as Options
from ssl_dist.voc.pretrained import Pretrained

PROTOCOL = (
    "one-vs-rest linear SVM on frozen features of {layer}, short side {resize}, {crop} {size}, cost of each class by "
    "{folds} folds of {train}; VOC's mean average precision by 11 points and by area, difficult ones ignored"
)
VERSION = 1
MAX_FEATURES = 9216  # of a stage, whose map is averaged to the largest grid that fits (Goyal et al. 2019)
EXTRACTION_BATCH_SIZE = 32
MAX_FIT_BYTES = 8 << 30  # of the fits that run at once


# ------------------------------------------------------------------------------------------------- features


def features_of(
    pretrained: Pretrained, split: Split, options: Options, folder: Path, device: torch.device, threads: int
) -> Features:
    """The features of a split, read from `folder` where they are there and fresh."""
    path = folder / f"voc-{split.dataset}-{split.name}-{options.layer}.safetensors"
    metadata = {
        "classes": json.dumps(CLASSES),
        "dataset": split.dataset,
        "split": split.name,
        "data": split.digest(),
        "transform": f"short side to {options.resize}, {options.crop} {options.size}, {pretrained.normalize}",
        "checkpoint": pretrained.sha256,
        "step": str(pretrained.step),
        "layer": options.layer,
        "method": pretrained.method,
        "backbone": pretrained.name,
    }
    if path.exists():
        with contextlib.suppress(UserError):  # damaged: made again
            stored = read_features(path)
            if stored.metadata == metadata:
                return stored
    network = Extractor(pretrained, options.layer).to(device)
    to_input = _input(pretrained, options)
    parts = []
    with Progress(f"features {split.title}", len(split), "image") as counter, torch.inference_mode():
        for images in read_ahead(to_input, zip(split.samples, strict=True), EXTRACTION_BATCH_SIZE, threads):
            parts.append(network(torch.stack(images).to(device)).cpu().numpy())
            counter.update(len(images))
    no_labels = np.full(len(split), -1, np.int64)  # an image has several classes
    write_features(path, np.concatenate(parts), no_labels, np.arange(len(split), dtype=np.int64), metadata)
    return read_features(path)


class Extractor(nn.Module):
    """Images [N, 3, S, S] -> features [N, D] of a layer; a stage's map is averaged to the largest square grid that
    gives at most `MAX_FEATURES` numbers."""

    def __init__(self, pretrained: Pretrained, layer: str):
        super().__init__()
        stages = pretrained.backbone.stages
        if layer != OUTPUT and layer not in stages:
            raise UserError(f"layer = {quoted(layer)}: backbone {pretrained.name} has {', '.join([OUTPUT, *stages])}")
        self.backbone, self.layer = pretrained.backbone, layer
        self.side = 0 if layer == OUTPUT else max(1, int((MAX_FEATURES / stages[layer]) ** 0.5))

    def forward(self, images: Tensor) -> Tensor:
        try:
            if self.layer == OUTPUT:
                return self.backbone(images).flatten(1)
            stage_map = self.backbone.forward_stages(images)[1][self.layer]
        except (RuntimeError, ValueError) as error:
            size = images.shape[-1]
            raise UserError(f"size = {size}: does not fit the backbone: {first_line(error)}") from None
        side = min(self.side, *stage_map.shape[-2:])
        return nn.functional.adaptive_avg_pool2d(stage_map, side).flatten(1)


def _input(pretrained: Pretrained, options: Options) -> Callable[[Sample], Tensor]:
    def load(sample: Sample) -> Tensor:
        image = resize(sample.image(), options.resize)
        square = [options.size, options.size]
        image = resize(image, square) if options.crop == "whole" else center_crop(image, square)
        return normalized(image, pretrained.normalize)

    return load


# ------------------------------------------------------------------------------------------------- the SVMs


def unit_rows(part: Features) -> np.ndarray:
    """float64 [N, D], each row of length 1."""
    rows = part.rows(0, len(part)).astype(np.float64)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def svm(rows: np.ndarray, positive: np.ndarray, cost: float, max_iter: int) -> LinearSVC:
    """The SVM of one class: squared hinge, positives weighted 2."""
    machine = LinearSVC(C=cost, class_weight={True: 2, False: 1}, dual=False, tol=1e-4, max_iter=max_iter)
    return machine.fit(rows, positive)


def choose_cost(rows: np.ndarray, positive: np.ndarray, options: Options) -> float:
    """The cost with the highest mean average precision over the folds; of equal ones the smallest."""
    if len(options.costs) == 1:
        return options.costs[0]
    folds = list(StratifiedKFold(options.folds).split(rows, positive))
    means = []
    for cost in sorted(options.costs):
        scores = []
        for train, held_out in folds:
            machine = svm(rows[train], positive[train], cost, options.max_iter)
            scores.append(average_precision_score(positive[held_out], machine.decision_function(rows[held_out])))
        means.append(np.mean(scores))
    return sorted(options.costs)[int(np.argmax(means))]


def evaluate(
    train: Features, train_labels: np.ndarray, test: Features, test_labels: np.ndarray, options: Options, workers: int
) -> dict[str, float]:
    """Percent: the means over the classes that are present, by 11 points and by area, and every class's average
    precision by 11 points; and whether all fits converged; costs on stderr. labels: [N, 20] of 1, 0 and -1."""
    present = present_classes(train_labels, test_labels, options)
    train_rows, test_rows = unit_rows(train), unit_rows(test)

    def one(label: int) -> tuple[float, float, float, bool]:
        positive = train_labels[:, label] > 0
        cost = choose_cost(train_rows, positive, options)
        machine = svm(train_rows, positive, cost, options.max_iter)
        scores = machine.decision_function(test_rows)
        return *classification_ap(scores, test_labels[:, label]), cost, machine.n_iter_ < options.max_iter

    # Beside a fold LIBLINEAR keeps its own form of it, twice as large.
    threads = max(1, min(workers, len(present), MAX_FIT_BYTES // (3 * train_rows.nbytes)))
    with ThreadPoolExecutor(threads, "svm") as pool, Progress("classification", len(present), "SVM") as bar:
        rows = []
        for row in pool.map(one, present):
            rows.append(row)
            bar.update(1)
    eleven, area, costs, converged = (np.array(column) for column in zip(*rows, strict=True))
    values = {
        "voc_classification_map_11point": 100 * eleven.mean(),
        "voc_classification_map_area": 100 * area.mean(),
        "voc_classification_converged": float(converged.all()),
    }
    chosen = ", ".join(f"{CLASSES[label]} {cost:.3g}" for label, cost in zip(present, costs, strict=True))
    print(f"classification: costs {chosen}", file=sys.stderr, flush=True)
    return values | {f"voc_classification_ap_{CLASSES[c]}": 100 * ap for c, ap in zip(present, eleven, strict=True)}


def present_classes(train_labels: np.ndarray, test_labels: np.ndarray, options: Options) -> list[int]:
    """The classes that the images show: all 20 in VOC itself. Raises `UserError` for one with too few images."""
    present = []
    for label, name in enumerate(CLASSES):
        positive, tested = int((train_labels[:, label] > 0).sum()), int((test_labels[:, label] > 0).sum())
        if not positive and not tested:
            continue
        present.append(label)
        if min(positive, len(train_labels) - positive) < options.folds:
            raise UserError(
                f"train_split = {quoted(options.train_split)}: {positive} of {len(train_labels)} images show a {name}; "
                f"{options.folds} folds need {options.folds} with and without it"
            )
        if not tested:
            raise UserError(f"test_split = {quoted(options.test_split)}: no image shows a {name}; choose another split")
    if not present:
        raise UserError(
            f"train_split = {quoted(options.train_split)}: no image shows any class; restore the lists of classes"
        )
    return present
