"""The features file: one split of a data set as one checkpoint sees it. Everything that evaluates features reads it.

A safetensors file (8 bytes of length, a JSON header, the tensors) with `features` float32 [N, D], `labels` int64 [N],
`image_ids` int64 [N] and text metadata; any safetensors reader opens it. The format is read and written here by hand
because safetensors' own numpy functions hold whole tensors in memory: here the features stay on disk, mapped, and a
file of ImageNet's size costs no memory until its rows are asked for, chunk by chunk.
"""

import json
import math
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssl_dist.errors import UserError, refuse_unreadable
from ssl_dist.storage import durable

# classes is a JSON list of names ([] when unknown), data the SHA-256 of the split's samples,
# checkpoint that of the checkpoint's file.
METADATA = ("classes", "dataset", "split", "data", "transform", "checkpoint", "step", "layer", "method", "backbone")
_SAME_IN_A_PAIR = ("checkpoint", "layer", "dataset", "transform")
_DTYPES = {"labels": ("I64", "<i8"), "image_ids": ("I64", "<i8"), "features": ("F32", "<f4")}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Features:
    """The features of a split's images, or of a `subset` of them. labels: int64 [N] (-1 = unknown); image_ids: int64
    [N] (0 .. N-1 in a file, fewer in a subset); metadata: the names in `METADATA`; source: what errors call it.

    _whole: float32 [M, D], read-only and mapped from disk when read from a file (get rows with `rows` or `take`);
    _selected: its rows that a subset has, int64 [N], None for all."""

    _whole: np.ndarray
    labels: np.ndarray
    image_ids: np.ndarray
    metadata: dict[str, str]
    source: str = "features in memory"
    _mapping: mmap.mmap | None = field(default=None, repr=False, compare=False)
    _selected: np.ndarray | None = field(default=None, repr=False, compare=False)

    @classmethod
    def read(cls, path: str | Path) -> "Features":
        """See `read_features`."""
        return read_features(path)

    def write(self, path: str | Path) -> None:
        """See `write_features`; not of a subset, whose ids are not 0 .. N-1."""
        write_features(path, self.features, self.labels, self.image_ids, self.metadata)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dim(self) -> int:
        """D, the length of one image's features."""
        return self._whole.shape[1]

    @property
    def num_in_split(self) -> int:
        """Images of the whole split, also of a subset: ids are below it."""
        return len(self._whole)

    @property
    def features(self) -> np.ndarray:
        """All rows at once; a copy of those of a subset."""
        return self._whole if self._selected is None else self._whole[self._selected]

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of their labels; empty when the file knows none."""
        return json.loads(self.metadata.get("classes", "[]"))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A copy of rows start .. stop-1, float32 [stop - start, D]. Raises `UserError` when a value is not finite."""
        return self._copied(slice(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the rows with these numbers, in their order: int64 [n] -> float32 [n, D]; else like `rows`."""
        return self._copied(rows)

    def subset(self, rows: np.ndarray, split: str | None = None) -> "Features":
        """Only the rows with these numbers (int64 [n]), in their order. They stay where they are, in a mapped file or
        in memory, until they are asked for. `split`: the name that the part goes by, where it has one of its own."""
        metadata = self.metadata if split is None else self.metadata | {"split": split}
        source = self.source if split is None else f"{self.source} ({split})"
        selected = np.asarray(rows if self._selected is None else self._selected[rows], np.int64)
        return Features(self._whole, self.labels[rows], self.image_ids[rows], metadata, source, self._mapping, selected)

    def _copied(self, which: slice | np.ndarray) -> np.ndarray:
        numbers = which if self._selected is None else self._selected[which]
        rows = np.asarray(self._whole[numbers], dtype=np.float32)
        if not rows.flags.owndata:  # a slice of an array is a view; what was gathered is a copy already
            rows = rows.copy()
        if self._mapping is not None:
            # Pages once touched would count as this process's memory until the kernel wants them back.
            self._mapping.madvise(mmap.MADV_DONTNEED)
        _check_finite(rows, self.image_ids[which], self.source)
        return rows


def check_pair(train: Features, test: Features) -> None:
    """Raises `UserError` unless both come from one checkpoint, layer, data set and transform and have one width."""
    for name in _SAME_IN_A_PAIR:
        ours, theirs = train.metadata.get(name), test.metadata.get(name)
        if ours != theirs:
            raise UserError(
                f"{train.source} and {test.source} do not belong together: {name} is {_short(ours)!r} in the first and"
                f" {_short(theirs)!r} in the second; extract both again from one checkpoint"
            )
    if train.dim != test.dim:
        raise UserError(
            f"{train.source} and {test.source} do not belong together: {train.dim} and {test.dim} features an image;"
            " extract both again from one checkpoint"
        )


def require_labels(*parts: Features) -> None:
    """Raises `UserError` when an image has no label (-1) or the first part has fewer than two classes."""
    for part in parts:
        missing = int((part.labels < 0).sum())
        if missing:
            raise UserError(
                f"{part.source}: {missing} of {len(part)} images have no label (-1), which this evaluation needs;"
                " evaluate on a labelled split"
            )
    if len(np.unique(parts[0].labels)) < 2:
        raise UserError(
            f"{parts[0].source}: all images have label {parts[0].labels[0]}; at least two classes are needed"
        )


def lack_of_classes(labels: np.ndarray) -> str:
    """What labels int64 [N] lack for anything to be measured by them, in words; empty: nothing."""
    if (labels < 0).any():
        return "no labels"
    return "one class" if len(np.unique(labels)) < 2 else ""


def have_classes(train: Features, test: Features) -> bool:
    """Whether there are classes to measure by: not where one split, both train and test, has images without labels or
    only one class. Raises `UserError` as `require_labels` for parts that are two."""
    if train is test and lack_of_classes(test.labels):
        return False
    require_labels(train, test)
    return True


def write_features(
    path: str | Path, features: np.ndarray, labels: np.ndarray, image_ids: np.ndarray, metadata: dict[str, str]
) -> None:
    """Write the file whole or not at all (temporary file, fsync, rename).

    features float32 [N, D] may itself be mapped from disk: it is copied in chunks. image_ids must be 0 .. N-1 in order.
    Raises `UserError` for features that are not finite (a diverged checkpoint) and for an unwritable folder;
    `ValueError` for arrays or metadata that are no features file.
    """
    path = Path(path)
    arrays = {"labels": np.asarray(labels), "image_ids": np.asarray(image_ids), "features": features}
    fault = _fault({name: (a.dtype, a.shape) for name, a in arrays.items()}, metadata) or _fault_in_ids(image_ids)
    if fault:
        raise ValueError(f"{path}: {fault}")
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():  # the widest numbers first keeps all of them aligned
        header[name] = {"dtype": _DTYPES[name][0], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    step = max(1, _CHUNK_BYTES // (4 * features.shape[1]))
    with durable.atomic_write_or_refuse(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(np.ascontiguousarray(labels, "<i8").data)
        file.write(np.ascontiguousarray(image_ids, "<i8").data)
        for start in range(0, len(features), step):
            rows = np.ascontiguousarray(features[start : start + step], "<f4")
            _check_finite(rows, image_ids[start : start + step], str(path))
            file.write(rows.data)


def read_features(path: str | Path) -> Features:
    """The file at `path`, its features mapped, the rest in memory. Raises `UserError` when it is missing, truncated,
    not a features file, or not the whole split in order of image id."""
    path = Path(path)
    with refuse_unreadable(path, "`ssl-dist extract` writes it"), open(path, "rb") as file:
        header, start = _read_header(file, path)
        size = os.fstat(file.fileno()).st_size
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", {})
    layouts = {name: _layout(header.get(name), name, path) for name in _DTYPES}
    expected = start + max(end for _, _, end in layouts.values())
    if size != expected:
        raise UserError(f"{path}: {size} bytes where {expected} were written: truncated or damaged; extract again")
    fault = _fault({name: (np.dtype(_DTYPES[name][1]), shape) for name, (shape, _, _) in layouts.items()}, metadata)
    if not fault:
        arrays = {
            name: np.ndarray(shape, _DTYPES[name][1], buffer=mapping, offset=start + first)
            for name, (shape, first, _) in layouts.items()
        }
        labels, image_ids = arrays["labels"].astype(np.int64), arrays["image_ids"].astype(np.int64)
        fault = _fault_in_ids(image_ids) or _fault_in_labels(labels, json.loads(metadata["classes"]))
    if fault:
        raise UserError(f"{path}: {fault}; extract again")
    return Features(arrays["features"], labels, image_ids, metadata, str(path), mapping)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict, int]:
    """The JSON header and the byte at which the tensors start."""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if 2 <= length <= _MAX_HEADER_BYTES else b""
    try:
        header = json.loads(text) if len(text) == length else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise UserError(f"{path}: not a features file (no safetensors header); `ssl-dist extract` writes one")
    return header, 8 + length


def _layout(entry: object, name: str, path: Path) -> tuple[tuple[int, ...], int, int]:
    """Shape, first byte and end of one tensor of the header."""
    code, dtype = _DTYPES[name]
    fields = entry if isinstance(entry, dict) else {"dtype": "missing"}
    if fields.get("dtype") != code:
        raise UserError(
            f"{path}: not a features file: tensor {name} is {fields.get('dtype')}, not {code}; "
            "`ssl-dist extract` writes one"
        )
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2:
        are_sizes = all(isinstance(n, int) and n >= 0 for n in shape + offsets)
        if are_sizes and offsets[1] - offsets[0] == math.prod(shape) * np.dtype(dtype).itemsize:
            return tuple(shape), *offsets
    raise UserError(f"{path}: damaged header: tensor {name} does not fill its place; extract again")


def _fault(arrays: dict[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> str:
    """What is wrong with types, shapes or metadata, in words; empty when nothing is."""
    for name, (_, dtype) in _DTYPES.items():
        if arrays[name][0] != np.dtype(dtype):
            return f"{name} is {arrays[name][0]}, not {np.dtype(dtype)}"
    shape = arrays["features"][1]
    if len(shape) != 2 or 0 in shape:
        return f"features has shape {list(shape)}, not [N, D]"
    for name in ("labels", "image_ids"):
        if arrays[name][1] != shape[:1]:
            return f"{name} has shape {list(arrays[name][1])} beside features {list(shape)}"
    for name in METADATA:
        if not isinstance(metadata.get(name), str):
            return f"metadata {name} is missing"
    try:
        classes = json.loads(metadata["classes"])
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return f"metadata classes is {_short(metadata['classes'])!r}, not a JSON list of names"
    return ""


def _fault_in_ids(image_ids: np.ndarray) -> str:
    wrong = np.flatnonzero(image_ids != np.arange(len(image_ids)))
    if len(wrong) == 0:
        return ""
    return f"image_ids must be 0 .. {len(image_ids) - 1} in order, but row {wrong[0]} has {image_ids[wrong[0]]}"


def _fault_in_labels(labels: np.ndarray, classes: list[str]) -> str:
    highest = len(classes) - 1 if classes else np.iinfo(np.int64).max
    wrong = np.flatnonzero((labels < -1) | (labels > highest))
    return f"image {wrong[0]} has label {labels[wrong[0]]} of {len(classes)} classes" if len(wrong) else ""


def _check_finite(rows: np.ndarray, image_ids: np.ndarray, source: str) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{source}: the features of image {image_ids[finite.argmin()]} are not finite;"
            " the checkpoint has diverged, use an earlier one"
        )


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= 40 else f"{text[:40]}..."
