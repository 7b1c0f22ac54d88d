"""The data sets that transfer tables use, as torchvision lays them out: files below a folder, and lists of the splits.

torchvision's own classes read the lists. Of a split they keep the files and labels in attributes that are not public;
the tests compare what is taken from them with what the classes give.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_dist.convert.images import FileImages, Images, Source
from ssl_dist.errors import UserError

TEST_EVERY = 5  # EuroSAT has no splits: every fifth image of a class, by name, is a test image
FilesAndLabels = tuple[list[Any], list[int]]


@dataclass(frozen=True)
class Layout:
    """folder: of the files, below root; cls: the class in torchvision.datasets; splits: ours -> those that make it up;
    take: files and labels of what the class opened."""

    folder: str
    cls: str
    splits: Mapping[str, tuple[str, ...]]
    take: Callable[[Any], FilesAndLabels] = lambda data: (data._image_files, data._labels)


_TRAIN_TEST = {"train": ("train",), "test": ("test",)}
# Papers choose options on val and train the last time on both, so trainval is a split of its own.
_WITH_VAL = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}
LAYOUTS = {
    "food101": Layout("food-101", "Food101", _TRAIN_TEST),
    "flowers102": Layout("flowers-102", "Flowers102", _WITH_VAL),
    "pets": Layout(
        "oxford-iiit-pet",
        "OxfordIIITPet",
        {"trainval": ("trainval",), "test": ("test",)},
        lambda data: (data._images, data._labels),
    ),
    "aircraft": Layout("fgvc-aircraft-2013b", "FGVCAircraft", _WITH_VAL),
    "cars": Layout("stanford_cars", "StanfordCars", _TRAIN_TEST, lambda data: _unzipped(data._samples)),
    "dtd": Layout("dtd/dtd", "DTD", _WITH_VAL),
    "eurosat": Layout("eurosat", "EuroSAT", {}, lambda data: _unzipped(data.samples)),
}


def transfer_set(dataset: str, root: Path) -> Source:
    """The splits of a data set of `LAYOUTS` below root, or below the folder above it. Raises `UserError` when they are
    not there."""
    layout = LAYOUTS[dataset]
    if root.name == layout.folder.split("/")[0] and not (root / layout.folder).is_dir():
        root = root.parent
    if dataset == "eurosat":
        data = _opened(dataset, root)
        files, labels = layout.take(data)
        is_test = _every_fifth_of_a_class(np.asarray(labels))
        rows_of = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
        taken = {split: ([files[i] for i in rows], [labels[i] for i in rows]) for split, rows in rows_of.items()}
    else:
        taken = {}
        for split, parts in layout.splits.items():
            files, labels = [], []
            for part in parts:
                data = _opened(dataset, root, split=part)
                more_files, more_labels = layout.take(data)
                files, labels = [*files, *more_files], [*labels, *more_labels]
            taken[split] = files, labels
    splits: dict[str, Images] = {
        split: FileImages(root, [Path(file).relative_to(root).as_posix() for file in files], labels)
        for split, (files, labels) in taken.items()
    }
    # Older versions of torchvision do not name the flowers' classes.
    classes = getattr(data, "classes", None) or [str(number) for number in range(1, 103)]
    return Source([str(name) for name in classes], splits)


def _opened(dataset: str, root: Path, **options: str) -> Any:
    import torchvision

    layout = LAYOUTS[dataset]
    try:
        return getattr(torchvision.datasets, layout.cls)(root, download=False, **options)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split("You can use")[0].split())
        raise UserError(
            f"{dataset}: --root {root}: looked for {layout.folder}/ as torchvision.datasets.{layout.cls} has it "
            f"({reason}); put it there, or convert images with `ssl-dist convert folder --name {dataset} --root DIR`"
        ) from None


def _unzipped(samples: list[tuple[Any, int]]) -> FilesAndLabels:
    return [file for file, _ in samples], [label for _, label in samples]


def _every_fifth_of_a_class(labels: np.ndarray) -> np.ndarray:
    """bool [N]: whether an image is the fifth, tenth, ... of its class, in order."""
    position = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = labels == label
        position[members] = np.arange(members.sum())
    return position % TEST_EVERY == TEST_EVERY - 1
