"""`ssl-dist labels --images`: labels that SeLa's authors gave to images, in the CSV file that data.labels reads.

They come in two forms: in a checkpoint of the official code, a tensor in the order of torchvision's ImageFolder, which
is that of `convert`; and as a list, a file name and its labels a line (alexnet-labels.csv, resnet-labels.csv).
"""

import csv
import io
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ssl_dist.convert.listed import Places, images_of
from ssl_dist.convert.split import printable
from ssl_dist.convert.walk import EXTENSIONS
from ssl_dist.data import labels, manifest
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError, quoted
from ssl_dist.reading import open_regular
from ssl_dist.run.labels import information
from ssl_dist.storage import weights_file
from ssl_dist.storage.durable import atomic_write_or_refuse

TENSORS = ("L", "labels")  # in main.py's and cifar.py's checkpoints; in the files of August 2020
LISTS = (".csv", ".txt")


def import_labels(path: Path, images: Path, out: Path, overrides: Sequence[str]) -> str:
    """Write the labels of a file, a column a head, for `data.split` of the converted `data.root`; returns what
    was written in words, and the mutual information with the true labels, where there are any.

    images: the folder that was converted; its names must be those that `convert` recorded. Images that it left out
    (--skip-damaged) have no row. Raises `UserError`.
    """
    root, split = _settings(overrides)
    dataset = Dataset(root)
    split = dataset.uses.pretraining if split is None else split
    info = dataset.info(split)
    record = manifest.load(root).splits[split]
    source = images_of(images, split, "data.split =")
    names = source.names
    if source.listing() != record.listing:
        raise UserError(f"--images {images}: lists other images than those that {root} was converted from")
    is_stored = np.array([printable(name) not in record.skipped for name in names])
    id_of_place = np.where(is_stored, np.cumsum(is_stored) - 1, -1)
    if path.suffix.lower() in LISTS:
        places, labels_HN = _read_list(path, names)
    else:
        places, labels_HN = np.arange(len(names)), _read_tensor(path, len(names))
    ids = id_of_place[places]
    order = np.argsort(ids, kind="stable")
    order = order[ids[order] >= 0]
    ids, labels_HN = ids[order], labels_HN[:, order]
    with atomic_write_or_refuse(out) as file:
        file.write(labels.text(ids, labels_HN).encode())
    summary = f"{out}: labels of {len(ids)} of {info.count} images by {len(labels_HN)} head(s), of {path}"
    if not info.labelled:
        return summary
    return summary + information(dataset.labels(split)[ids], labels_HN, len(info.classes))


def _settings(overrides: Sequence[str]) -> tuple[str, str | None]:
    """data.root and data.split."""
    given = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if key not in ("data.root", "data.split") or not equals:
            raise UserError(f"override {quoted(override)}: with --images data.root and data.split can be set here")
        given[key] = value
    if "data.root" not in given:
        raise UserError("labels --images: add data.root=DIR, the converted data set that the labels are for")
    return given["data.root"], given.get("data.split")


def _read_tensor(path: Path, num_images: int) -> np.ndarray:
    """Labels [heads, N] of a file of torch.save: a tensor [heads, N] or [N], or a dictionary with one."""
    tree, _ = weights_file.read(path)
    found = tree
    if isinstance(tree, dict):
        found = next((tree[key] for key in TENSORS if key in tree), None)
        if found is None:
            keys = ", ".join(map(str, list(tree)[:8]))
            raise UserError(f"{path}: holds no labels, which are called {' or '.join(TENSORS)}; it holds {keys}")
    if not isinstance(found, Tensor):
        raise UserError(f"{path}: its labels are no tensor but a {type(found).__name__}")
    of_images = found.numpy()
    if of_images.ndim == 1:
        of_images = of_images[None]
    if of_images.ndim != 2 or of_images.shape[1] != num_images or of_images.dtype.kind != "i":
        raise UserError(
            f"{path}: its labels are {found.dtype} {list(found.shape)}; there must be whole numbers [heads, images] of "
            f"the {num_images} images of --images"
        )
    if of_images.min() < 0 or of_images.max() >= 10**labels.MAX_DIGITS:
        raise UserError(f"{path}: has labels {of_images.min()} to {of_images.max()}; they must be 0..999999")
    return of_images


def _read_list(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Places of the images int64 [n] that a list names, and their labels [heads, n].

    A line: columns that commas divide, one of them the file name, with or without folders and extension, the others
    whole numbers, a label a head. A first line names the columns when no word of it names an image or looks like the
    name of one; one of whole numbers that it gives no name, or calls index, counts the lines and is left out. The
    authors nowhere say how their files are laid out; these are the forms that pandas and a hand-written loop give.
    """
    places, found, num_labels = Places(names), dict[int, int](), 0
    flat = array("i")  # the labels of all lines, one after the other
    named_columns: list[str] | None = None
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                words = [word.strip() for word in row]
                if not any(words):
                    continue
                is_number = [labels.is_whole_number(word) for word in words]
                is_first = not found and named_columns is None
                if is_first and not any(_looks_like_an_image(word) or places.named(word) for word in words if word):
                    named_columns = words
                    continue
                where = f"{path} line {number}"
                if is_number.count(False) != 1 or len(words) < 2:
                    raise UserError(f"{where}: must have one file name and whole numbers beside it, divided by commas")
                image = places.of(words[is_number.index(False)], where)
                if image in found:
                    raise UserError(f"{where}: its image stands on line {found[image]}, too")
                values = [
                    int(word)
                    for column, word in enumerate(words)
                    if is_number[column] and not _is_index(named_columns, column, len(words), where)
                ]
                if not values or any(value >= 10**labels.MAX_DIGITS for value in values):
                    raise UserError(f"{where}: needs labels, whole numbers 0..999999")
                if found and len(values) != num_labels:
                    raise UserError(f"{where}: has {len(values)} label(s), the lines before have {num_labels}")
                found[image], num_labels = number, len(values)
                flat.extend(values)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if not found:
        raise UserError(f"{path}: lists no image")
    return np.array(list(found), np.int64), np.array(flat, np.int32).reshape(-1, num_labels).T


def _looks_like_an_image(word: str) -> bool:
    """Such a word is no name of a column: where no image has it, it is a mistake, as it is on any other line."""
    return "/" in word or word.lower().endswith(EXTENSIONS)


def _is_index(named_columns: list[str] | None, column: int, num_columns: int, where: str) -> bool:
    if named_columns is None:
        return False
    if len(named_columns) != num_columns:
        raise UserError(f"{where}: has {num_columns} columns, the first line names {len(named_columns)}")
    return named_columns[column].lower() in ("", "index")
