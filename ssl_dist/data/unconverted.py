"""Data sets that are not converted here, by what is published of them: enough to plan a training, not to train."""

from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from pydantic import Field

from ssl_dist.config import PositiveInt, Section, validate
from ssl_dist.config.section import parse_yaml
from ssl_dist.data.catalog import CATALOG
from ssl_dist.data.manifest import FILE, Encoding, Manifest, SplitRecord
from ssl_dist.data.reader import SplitInfo
from ssl_dist.data.readers import Dataset


class Sizes(Section):
    """Of published_sizes.yaml, beside this file, whose first lines say what the fields are."""

    splits: dict[str, PositiveInt] = Field(min_length=1)
    classes: PositiveInt
    height: PositiveInt
    width: PositiveInt
    source: str


class Unconverted(Dataset):
    """Of published_sizes.yaml. Its images have labels, as many of each class as of any other, but in a split
    `unlabeled`; no split can be opened."""

    is_converted = False

    def __init__(self, name: str, root: str, reader: str):
        self.sizes = published_sizes()[name]
        super().__init__(root, name, reader, _manifest(name, self.sizes))

    def info(self, split: str) -> SplitInfo:
        record = self._record(split)
        return SplitInfo(
            self.name, split, record.count, tuple(self._manifest.classes), record.max_height, record.max_width,
            record.labelled, self._manifest.mean, self._manifest.std, record.sha256,
        )  # fmt: skip

    def labels(self, split: str) -> np.ndarray:
        record = self._record(split)
        labels = np.arange(record.count, dtype=np.int64) % self.sizes.classes
        return labels if record.labelled else np.full_like(labels, -1)


def find(name: str | None, root: str, reader: str) -> Unconverted | None:
    """The data set of this name where `root` holds no converted one. None: there is one, or nothing is published."""
    if (Path(root) / FILE).exists() or name not in published_sizes():
        return None
    return Unconverted(name, root, reader)


@cache
def published_sizes() -> dict[str, Sizes]:
    """By the data set's name."""
    text = resources.files("ssl_dist.data").joinpath("published_sizes.yaml").read_text(encoding="utf-8")
    rows = parse_yaml(text, "published_sizes.yaml")
    return {name: validate(Sizes, row, f"published_sizes.yaml: {name}: ") for name, row in rows.items()}


def _manifest(name: str, sizes: Sizes) -> Manifest:
    entry = CATALOG[name]
    splits = {}
    for split, count in sizes.splits.items():
        labelled = split != "unlabeled"
        of_class = [count // sizes.classes + (label < count % sizes.classes) for label in range(sizes.classes)]
        splits[split] = SplitRecord(
            count=count, labelled=labelled, class_counts=of_class if labelled else [0] * sizes.classes,
            max_height=sizes.height, max_width=sizes.width, raw=0, jpeg=count, bytes=1, sha256="", listing="",
        )  # fmt: skip
    return Manifest(
        name=name, about=entry.about, classes=[str(label) for label in range(sizes.classes)], splits=splits,
        pretraining=entry.pretraining, training=entry.training, evaluation=entry.evaluation,
        image_size=entry.image_size, mean=entry.paper_mean or (0.5,) * 3, std=entry.paper_std or (0.25,) * 3,
        measured_images=1, paper_mean=None, paper_std=None,
        encoding=Encoding(raw_side=entry.raw_side, max_side=entry.max_side, jpeg_quality=90),
    )  # fmt: skip
