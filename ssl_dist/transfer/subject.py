"""What an evaluation works on: a run's encoder, and which images it may learn from and is measured on."""

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
from ssl_dist.run.encoder import Encoder


@dataclass(frozen=True)
class EvalContext:
    """A run's encoder, the data set it is measured on, and the ranks that do it together.

    train_ids: the images of the training split that may be used, None: all; test_ids: those of the split `test` that
    are counted, None: all; subset: the user's choice of training images in words, None: all; part: what the images that
    are counted are called, where they are not the whole split; files: features files by split, once they are up to
    date.
    """

    run: Path
    encoder: Encoder
    source: Dataset
    train: str
    test: str
    world: World
    watchdog: Watchdog
    train_ids: np.ndarray | None = None
    test_ids: np.ndarray | None = None
    subset: str | None = None
    part: str | None = None
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """What results.json keeps of it."""
        return {
            "dataset": self.source.name,
            "split": self.part or self.test,
            "data": self.source.info(self.test).sha256,
            "checkpoint": self.encoder.sha256,
            "step": str(self.encoder.step),
            "method": self.encoder.config.method.name,
            "backbone": self.encoder.config.backbone.name,
        }

    def digest(self, settings: dict) -> str:
        """Eight letters that stand for these settings on these images by this checkpoint."""
        parts = [json.dumps(settings, sort_keys=True), self.encoder.sha256, self.train, self.source.name]
        parts += [self.source.info(self.train).sha256]
        digest = hashlib.sha256("\n".join(parts).encode())
        if self.train_ids is not None:
            digest.update(self.train_ids.tobytes())
        return digest.hexdigest()[:8]


def chosen_images(source: Dataset, split: str, subset: ClassSubset | str) -> tuple[np.ndarray, str]:
    """The ids of `data.subset` in a split, int64 [n], and the choice in words. Raises `UserError`."""
    count = source.info(split).count
    if isinstance(subset, str):
        ids = plan.from_list(subset, count)
        return ids, f"the {len(ids)} images of {Path(subset).name} ({hashlib.sha256(ids.tobytes()).hexdigest()[:8]})"
    ids = plan.per_class(np.arange(count, dtype=np.int64), source.labels(split), subset.per_class, subset.start)
    from_where = f" from number {subset.start}" if subset.start else ""
    return ids, f"{subset.per_class} images a class{from_where}"


def held_out(subject: EvalContext, share: float) -> EvalContext:
    """The same with `share` of its training images held out and measured on, and the test split out of reach.

    The part is drawn by the run's seed, class by class. Raises `UserError` for a class of one image or without labels.
    """
    source, split, ids = subject.source, subject.train, subject.train_ids
    if ids is None:
        ids = np.arange(source.info(split).count, dtype=np.int64)
    held = plan.held_out(ids, source.labels(split)[ids], share, subject.encoder.config.seed)
    rest = np.setdiff1d(ids, held, assume_unique=True)
    part = f"{split}[held out {100 * share:g}%]"
    return replace(subject, test=split, train_ids=rest, test_ids=held, part=part)
