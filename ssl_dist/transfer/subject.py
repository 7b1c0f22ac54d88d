"""The context of an evaluation: a run's encoder, and the images that it learns from and is measured on."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ssl_dist.config import ClassSubset
from ssl_dist.data import plan
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.watchdog import Watchdog
from ssl_dist.distributed.world import World
from ssl_dist.errors import UserError
from ssl_dist.run.encoder import Encoder


@dataclass(frozen=True)
class EvalContext:
    """A run's encoder, the data set that it is measured on, and the ranks that do it together.

    train, test: names of splits; train_ids: the images of `train` that may be used, None: all; test_ids: the measured
    images of `test`, None: all; subset: the user's choice of training images in words, None: all; held_out: the name of
    the part of `train` that is measured in place of the test split, None: the test split is measured; features_files:
    by split, once they are up to date.
    """

    run: Path
    encoder: Encoder
    dataset: Dataset
    train: str
    test: str
    world: World
    watchdog: Watchdog
    train_ids: np.ndarray | None = None
    test_ids: np.ndarray | None = None
    subset: str | None = None
    held_out: str | None = None
    features_files: dict[str, Path] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether one split is both what is learned from and what is measured."""
        return self.train == self.test and self.held_out is None

    @property
    def metadata(self) -> dict[str, str]:
        """What results.json keeps of it."""
        return {
            "dataset": self.dataset.name,
            "split": self.held_out or self.test,
            "data": self.dataset.info(self.test).sha256,
            "train_data": self.dataset.info(self.train).sha256,
            "layer": self.encoder.layer,
            "transform": self.encoder.transform,
            "checkpoint": self.encoder.sha256,
            "step": str(self.encoder.step),
            "method": self.encoder.config.method.name,
            "backbone": self.encoder.config.backbone.name,
        }

    def digest(self, settings: dict) -> str:
        """Eight hexadecimal digits of a hash of these settings, the checkpoint and the training images."""
        parts = [json.dumps(settings, sort_keys=True), self.encoder.sha256, self.train, self.dataset.name]
        parts += [self.dataset.info(self.train).sha256, *self.encoder.changed]
        if not self.encoder.ids:  # of another program: they are given with every evaluation, and no change of a run's
            parts += [self.encoder.transform, self.encoder.config.backbone.name]
        digest = hashlib.sha256("\n".join(parts).encode())
        if self.train_ids is not None:
            digest.update(self.train_ids.tobytes())
        return digest.hexdigest()[:8]


def chosen_images(
    dataset: Dataset, split: str, subset: ClassSubset | str, setting: str = "data.subset"
) -> tuple[np.ndarray, str]:
    """The ids of `data.subset` in a split, int64 [n], and the choice in words. Raises `UserError`, which names the
    setting."""
    count = dataset.info(split).count
    if isinstance(subset, str):
        ids = plan.from_list(subset, count, setting)
        return ids, f"the {len(ids)} images of {Path(subset).name} ({hashlib.sha256(ids.tobytes()).hexdigest()[:8]})"
    ids, labels = np.arange(count, dtype=np.int64), dataset.labels(split)
    ids = plan.per_class(ids, labels, subset.per_class, subset.start, setting)
    from_where = f" from number {subset.start}" if subset.start else ""
    return ids, f"{subset.per_class} images a class{from_where}"


def hold_out(context: EvalContext, held_out: float | ClassSubset | str) -> EvalContext:
    """The same context with a part of the training images held out, and measured instead of the test split.

    held_out: a share of those that are learned from, drawn by the run's seed, class by class; or images of the split as
    `data.subset` chooses them, which are not learned from then. Raises `UserError` for a class of one image or without
    labels, and where images of the choice are learned from by another choice.
    """
    dataset, split, ids = context.dataset, context.train, context.train_ids
    if isinstance(held_out, float):
        if ids is None:
            ids = np.arange(dataset.info(split).count, dtype=np.int64)
        held_out_ids = plan.held_out(ids, dataset.labels(split)[ids], held_out, context.encoder.config.seed)
        what = f"{100 * held_out:g}%"
    else:
        held_out_ids, what = chosen_images(dataset, split, held_out, "--validation")
        if ids is None:
            ids = np.arange(dataset.info(split).count, dtype=np.int64)
        elif len(both := np.intersect1d(ids, held_out_ids)):
            raise UserError(f"--validation: {len(both)} of its images are in data.subset; give others")
    train_ids = np.setdiff1d(ids, held_out_ids, assume_unique=True)
    if not len(train_ids):
        raise UserError(f"--validation: holds out all images of {split}; leave some to learn from")
    return replace(
        context, test=split, train_ids=train_ids, test_ids=held_out_ids, held_out=f"{split}[held out {what}]"
    )
