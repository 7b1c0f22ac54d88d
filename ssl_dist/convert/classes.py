"""Labels as shards and tables hold them, numbers or names, to the classes of a data set."""

from collections.abc import Mapping, Sequence

import numpy as np

from ssl_dist.convert.images import Images, Source
from ssl_dist.errors import UserError, quoted

MAX_CLASSES = 100_000  # of labels that are numbers: above that they are ids, or in another unit
Label = int | str | None  # None, and -1: unknown


def source_of(
    splits: dict[str, Images],
    labels: Mapping[str, Sequence[Label]],
    names: Sequence[str] | None,
    root: object,
    left_out: Sequence[str],
    notes: Sequence[str],
) -> Source:
    """The splits with their labels as `numbered` makes them. A split train without any is the split unlabeled, as in a
    folder of images, unless there is one of that name."""
    classes, numbers, more = numbered(labels, names, root)
    notes = [*notes, *more]
    for split, images in splits.items():
        images.labels = numbers[split]
        if 0 < (lacking := int((images.labels < 0).sum())) < len(images.labels):
            notes.append(f"{split}: {lacking} of {len(images.labels)} images have no label")
    if "train" in splits and "unlabeled" not in splits and (splits["train"].labels < 0).all():
        notes.append("train: its images have no labels, so it is the split unlabeled")
        splits = {"unlabeled" if split == "train" else split: images for split, images in splits.items()}
    return Source(classes, splits, left_out, notes)


def numbered(
    labels: Mapping[str, Sequence[Label]], names: Sequence[str] | None, root: object
) -> tuple[list[str], dict[str, np.ndarray], list[str]]:
    """Class names, split -> labels int64 [N], -1 unknown, and notes for the user.

    Names as labels: classes are the sorted ones of the split train (the first with labels without it). Numbers: class i
    is names[i], or str(i) up to the highest. Raises `UserError` for both at once, a number without a name, and a name
    that only other splits have.
    """
    distinct = {split: {label for label in own if label is not None and label != -1} for split, own in labels.items()}
    everything = set[int | str]().union(*distinct.values())
    if not everything:
        return [], {split: np.full(len(own), -1, np.int64) for split, own in labels.items()}, []
    if any(isinstance(label, str) for label in everything):
        return *_named(labels, distinct, root), []
    values = [label for label in everything if isinstance(label, int)]
    highest, lowest = max(values), min(values)
    limit = len(names) if names is not None else MAX_CLASSES
    if lowest < 0 or highest >= limit:
        wrong = lowest if lowest < 0 else highest
        known = f"there are {limit} class names" if names is not None else f"at most {MAX_CLASSES} classes are taken"
        remedy = "number the classes from 0, name other labels with --label-key, or leave them with --unlabeled"
        raise UserError(f"--root {root}: the label {wrong}: {known}; {remedy}")
    classes = list(names) if names is not None else [str(label) for label in range(highest + 1)]
    notes = []
    if empty := len(classes) - len(everything):
        first = next(label for label in range(len(classes)) if label not in everything)
        notes.append(f"{empty} of the classes 0 to {len(classes) - 1} have no image, {first} for one")
    return (
        classes,
        {split: np.array([-1 if v is None else v for v in own], np.int64) for split, own in labels.items()},
        notes,
    )


def _named(
    labels: Mapping[str, Sequence[Label]], distinct: Mapping[str, set[int | str]], root: object
) -> tuple[list[str], dict[str, np.ndarray]]:
    for split, found in distinct.items():
        if numbers := [label for label in found if not isinstance(label, str)]:
            raise UserError(f"--root {root}: {split}: labels are names, and {numbers[0]} is none; give all a name")
    main = next(split for split in ("train", *distinct) if distinct.get(split))
    classes = sorted(label for label in distinct[main] if isinstance(label, str))
    number_of: dict[Label, int] = {name: number for number, name in enumerate(classes)}
    for split, found in distinct.items():
        if unknown := sorted(str(label) for label in found - number_of.keys()):
            raise UserError(
                f"--root {root}: {split}: {quoted(unknown[0])}, a class that {main} does not have; remove its images "
                "or add some there"
            )
    return classes, {split: np.array([number_of.get(v, -1) for v in own], np.int64) for split, own in labels.items()}
