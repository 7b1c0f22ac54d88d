"""Labels from a text file in the place of a split's own: pseudo-labels of a method, or any other."""

import csv
import io
from pathlib import Path

import numpy as np

from ssl_dist.errors import UserError
from ssl_dist.reading import open_regular

KEYS = ("data.labels.file", "data.labels.column")
MAX_DIGITS = 6  # of a label: a classifier has an output for every number up to the largest
MAX_ID_DIGITS = 18  # fits 64 bits


def read(path: str | Path, column: int, count: int, keys: tuple[str, str] = KEYS) -> np.ndarray:
    """int64 [count], -1 for images that the file does not list. count: the split's images; keys: those of the file and
    of the column, for errors.

    The file: CSV, a first line of names (image_id, then one or more label columns), then a line an image with its id
    and a whole number of 0 to 999,999 a column, or nothing; `column` counts the label columns from 0. Raises
    `UserError` that names the line.
    """
    label_of: dict[int, int] = {}
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            names = next(rows, [])
            if len(names) < 2 or names[0] != "image_id":
                raise _fault(keys, path, 1, "must name its columns: image_id,label")
            if column >= len(names) - 1:
                raise UserError(f"{keys[1]} = {column}: {path} has {len(names) - 1} label column(s), counted from 0")
            for number, row in enumerate(rows, 2):
                if len(row) < 2 and not "".join(row).strip():  # a blank line
                    continue
                if len(row) != len(names) or not all(word.isascii() and word.isdigit() for word in row):
                    raise _fault(keys, path, number, f"must be {len(names)} whole numbers")
                if not is_whole_number(row[0]) or len(row[1 + column]) > MAX_DIGITS:
                    raise _fault(keys, path, number, f"a label has {MAX_DIGITS} digits at most, an id {MAX_ID_DIGITS}")
                image_id = int(row[0])
                if image_id >= count:
                    what = f"image {image_id} is not in the split's 0..{count - 1}; give labels of this split"
                    raise _fault(keys, path, number, what)
                if image_id in label_of:
                    raise _fault(keys, path, number, f"image {image_id} stands twice")
                label_of[image_id] = int(row[1 + column])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{keys[0]} = {str(path)!r}: cannot be read: {reason}") from None
    labels = np.full(count, -1, np.int64)
    labels[list(label_of)] = list(label_of.values())
    return labels


def is_whole_number(word: str) -> bool:
    """Whether `word` is a number in plain digits that fits 64 bits. `str.isdigit` alone takes exponents and circles,
    too, which int() refuses as it does thousands of digits."""
    return word.isascii() and word.isdigit() and len(word) <= MAX_ID_DIGITS


def text(image_ids: np.ndarray, labels: np.ndarray) -> str:
    """The text of such a file: image_ids int64 [n], labels whole numbers [columns, n], named label_0, label_1, ..."""
    names = ["image_id", *(f"label_{column}" for column in range(len(labels)))]
    rows = np.column_stack([image_ids, *labels]).tolist()
    return "".join(",".join(map(str, row)) + "\n" for row in [names, *rows])


def _fault(keys: tuple[str, str], path: str | Path, line: int, what: str) -> UserError:
    return UserError(f"{keys[0]}: {path} line {line}: {what}")
