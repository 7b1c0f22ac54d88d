"""Tables of images: parquet, as on the Hugging Face hub, and what datasets saved (`save_to_disk`). Read by pyarrow."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssl_dist.convert.classes import Label, source_of
from ssl_dist.convert.images import Images, Loader, Source, stamps_of
from ssl_dist.convert.shards import SPLIT_OF_WORD, NoShards, find
from ssl_dist.convert.table_files import FETCH_AGAIN, ArrowStream, Format, Parquet, import_pyarrow
from ssl_dist.convert.walk import LeftOut
from ssl_dist.errors import UserError, quoted, refuse_unreadable
from ssl_dist.reading import parse_json, read_text

ROWS_OF_LABELS = 4096
OTHER_COLUMNS = "columns that are not read"
IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label",)  # of a column that is taken before others of its kind


def parquet(root: Path, unlabeled: bool = False, image_key: str | None = None, label_key: str | None = None) -> Source:
    """Every row of the files that `shards.find` finds, in the order of their names and then of the rows.

    The image is a struct of bytes and path (the hub's Image), or bytes; the label a whole number, with names where the
    schema's `huggingface` metadata has them (ClassLabel), or a name; -1 and null: unknown. image_key and label_key name
    the columns; without: see `_columns`. Files are read a page after the other, so memory does not grow with their row
    groups. Raises `UserError` for a file that can not be read, and columns that are missing, ambiguous or of other
    types.
    """
    format = Parquet(import_pyarrow("parquet"))
    shards = find(root, ".parquet", unlabeled)
    return _source(format, root, shards.folder, shards.splits, shards.left_out, unlabeled, image_key, label_key)


def huggingface(
    root: Path, unlabeled: bool = False, image_key: str | None = None, label_key: str | None = None
) -> Source:
    """The rows of a Dataset or DatasetDict that `save_to_disk` has written; a Dataset is the split train. Columns and
    refusals: see `parquet`."""
    format = ArrowStream(import_pyarrow("huggingface"))
    if (root / "dataset_dict.json").is_file():
        path = root / "dataset_dict.json"
        names = _json(path).get("splits")
        if not isinstance(names, list) or not names or not all(_is_plain(name) for name in names):
            raise UserError(f"{path}: splits = {quoted(names)}: no list of names; {FETCH_AGAIN}")
        folders = {name: name for name in names}
    elif (root / "state.json").is_file():
        folders = {"train": ""}
    else:
        below = sorted(path.parent for name in ("dataset_dict.json", "state.json") for path in root.glob(f"*/{name}"))
        where = f"; one lies in {below[0]}" if below else ""
        raise NoShards(f"--root {root}: no data set that datasets saved: no dataset_dict.json or state.json{where}")
    splits = dict[str, list[str]]()
    for name, folder in folders.items():
        split = SPLIT_OF_WORD.get(name.lower(), name)
        if split in splits:
            raise UserError(f"{root}: two of {', '.join(folders)} are the split {split}; save it with one of them")
        splits[split] = [os.path.join(folder, file) for file in _saved_files(root / folder / "state.json")]
    if unlabeled:
        splits = {"unlabeled": [file for files in splits.values() for file in files]}
    return _source(format, root, root, splits, LeftOut(), unlabeled, image_key, label_key)


class TableImages(Images):
    """The images of a column. They are read in order, by `loaders`; stamps: of the files, before they were read."""

    def __init__(
        self, format: Format, folder: Path, files: Sequence[str], column: str, names: Sequence[str], stamps: str
    ):
        super().__init__(names, np.full(len(names), -1, np.int64))
        self.folder, self._format, self._files, self._column, self._stamps = folder, format, files, column, stamps

    def files(self) -> Sequence[str]:
        return self.names

    def describe(self, i: int) -> str:
        return str(self.folder / self.names[i])

    def loaders(self, count: int) -> Iterator[list[Loader]]:
        left = len(self.names)
        for file in self._files:
            for batch in self._format.batches(self.folder / file, [self._column], count):
                images = batch.column(self._column)
                left -= len(images)
                if left < 0:
                    break
                yield [partial(_image, images, i, self.folder) for i in range(batch.num_rows)]

        if left:
            raise UserError(f"{self.folder}: has another number of rows than before; let no one write to it meanwhile")

    def stamps(self) -> str:
        return self._stamps


def _source(
    format: Format,
    root: Path,
    folder: Path,
    files_of: Mapping[str, list[str]],
    left_out: LeftOut,
    unlabeled: bool,
    image_key: str | None,
    label_key: str | None,
) -> Source:
    pa = format.pa
    first = next(file for files in files_of.values() for file in files)
    columns = _columns(pa, folder / first, format.schema(folder / first), image_key, label_key, unlabeled)
    for name in columns.others:
        left_out.add(OTHER_COLUMNS, name)
    splits: dict[str, Images] = {}
    labels: dict[str, list[Label]] = {}
    for split, files in files_of.items():
        # Two columns may hold images in the same rows: without its name, one would pass for the other.
        stamps = f"{stamps_of(folder, files)} {columns.image}"
        names, own, paths = list[str](), list[Label](), list[str]()
        for file in files:
            schema = format.schema(folder / file)
            other = _columns(pa, folder / file, schema, columns.image, columns.label, unlabeled or not columns.label)
            if other.types != columns.types or other.classes != columns.classes:
                raise UserError(
                    f"{folder / file}: types or class names of {' and '.join(columns.types)} are not those of {first}; "
                    "write all files alike"
                )
            for row, path, label in _rows(format, folder / file, columns):
                names.append(f"{file}/{row}/{os.path.basename(path)}" if path else f"{file}/{row}")
                own.append(label)
                paths += [path] if os.path.dirname(path) else []
        if not names:
            raise UserError(f"{folder / files[0]}: the split {split} has no rows; give files with images")
        labels[split] = own
        splits[split] = TableImages(
            format, folder, files, columns.image, names, stamps + stamps_of(folder, paths) if paths else stamps
        )
    notes = []
    if columns.label is None and not unlabeled:
        notes.append("no column is known to hold labels; --label-key names one")
    return source_of(splits, labels, columns.classes, root, left_out.lines(), notes)


# ----------------------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class _Columns:
    """image, label: names (label None: there are no labels); types: name -> type; classes: their names, where the
    metadata have them."""

    image: str
    label: str | None
    types: dict[str, Any]
    classes: list[str] | None
    others: list[str]


def _columns(
    pa: Any, path: Path, schema: Any, image_key: str | None, label_key: str | None, unlabeled: bool
) -> _Columns:
    """The column of the images: image_key, else the only one of the type, else `image` or `img`; that of the labels:
    label_key, else `label`, else the only ClassLabel."""
    types = {field.name: field.type for field in schema}
    if len(types) < len(schema):
        twice = next(name for name in types if schema.names.count(name) > 1)
        raise UserError(f"{path}: two columns have the name {quoted(twice)}; write it with one of them")
    features = _features(path, schema)
    listed = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    images = [name for name, kind in types.items() if _holds_images(pa, kind)]
    image = image_key if image_key is not None else _only(images, IMAGE_NAMES)
    if image is None:
        what = f"{', '.join(images)} hold bytes" if images else "no column holds images as bytes"
        raise UserError(f"{path}: {what}; name the images' by --image-key; there are {listed}")
    if image not in images:
        raise UserError(f"{path}: --image-key {quoted(image)}: no column of images as bytes; there are {listed}")
    named = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    label = None if unlabeled else label_key
    if label is None and not unlabeled:
        label = _only([name for name in types if name in LABEL_NAMES] or list(named), ())
        if label is None and named:
            raise UserError(f"{path}: {', '.join(named)} hold labels; name those to take by --label-key")
    if label is not None and not _holds_labels(pa, types.get(label)):
        what = f"is of type {types[label]}, no whole number and no name" if label in types else "no such column"
        raise UserError(
            f"{path}: --label-key {quoted(label)}: {what}; give another, or --unlabeled; there are {listed}"
        )
    classes = named.get(label) if label is not None else None
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise UserError(f"{path}: the class names of {label} are {quoted(classes)}, no list of text; {FETCH_AGAIN}")
    if classes and len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{path}: the class {quoted(twice)} of {label} stands twice; give every class its own name")
    taken = {name: types[name] for name in (image, label) if name is not None}
    return _Columns(image, label, taken, classes, [name for name in types if name not in taken])


def _only(names: Sequence[str], preferred: Sequence[str]) -> str | None:
    """The only name, or that of the preferred ones; None: there is none, or several."""
    if len(names) == 1:
        return names[0]
    return next((name for name in preferred if name in names), None)


def _holds_images(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _is_bytes(pa, kind.field(position).type)
    return _is_bytes(pa, kind)


def _is_bytes(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_labels(pa: Any, kind: Any) -> bool:
    types = pa.types
    if kind is not None and types.is_dictionary(kind):
        kind = kind.value_type
    return kind is not None and (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def _features(path: Path, schema: Any) -> dict[str, dict[str, Any]]:
    """Column -> what datasets says of it in the schema's metadata; empty: nothing."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        tree = parse_json(text.decode())
    except ValueError as error:
        raise UserError(f"{path}: the metadata `huggingface` are no JSON ({error}); {FETCH_AGAIN}") from None
    for key in ("info", "features"):
        tree = tree.get(key) if isinstance(tree, dict) else None
    features = tree if isinstance(tree, dict) else {}
    return {name: {"names": None, **feature} for name, feature in features.items() if isinstance(feature, dict)}


# ------------------------------------------------------------------------------------------------------- rows, images


def _rows(format: Format, path: Path, columns: _Columns) -> Iterator[tuple[int, str, Label]]:
    """Row, the path of the image's file or "", and label of every row."""
    pa = format.pa
    is_struct = pa.types.is_struct(columns.types[columns.image])
    has_path = is_struct and columns.types[columns.image].get_field_index("path") >= 0
    wanted = [f"{columns.image}.path"] if has_path else []
    row = 0
    for batch in format.batches(path, [*wanted, *([columns.label] if columns.label else [])], ROWS_OF_LABELS):
        paths: Sequence[Any] = [""] * batch.num_rows
        if has_path:
            paths = _texts(pa, batch.column(columns.image).field("path"))
        labels: Sequence[Label] = [None] * batch.num_rows
        if columns.label is not None:
            array = batch.column(columns.label)
            array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
            labels = array.to_pylist() if pa.types.is_integer(array.type) else _names(pa, path, row, array)
        for file, label in zip(paths, labels, strict=True):
            yield row, file or "", label
            row += 1


def _texts(pa: Any, array: Any) -> list[str | None]:
    """Text that may be no UTF-8, as the names of files are."""
    kind = pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()
    return [None if value is None else os.fsdecode(value) for value in array.cast(kind).to_pylist()]


def _names(pa: Any, path: Path, row: int, array: Any) -> list[str | None]:
    names = _texts(pa, array)
    for number, name in enumerate(names):
        if name is not None and not name.isprintable():
            raise UserError(
                f"{path}: row {row + number}: the label {quoted(name)} is no name; give another --label-key"
            )
    return names


def _image(column: Any, i: int, folder: Path) -> bytes:
    """The bytes in row i of a column of images. Raises ValueError or OSError where there are none."""
    value = column[i]
    if not hasattr(value, "keys"):  # no struct
        data = value.as_py()
        if data is None:
            raise ValueError("the row holds no image")
        return data
    data = value["bytes"].as_py() if value.is_valid else None
    if data is not None:
        return data
    path = value["path"].as_py() if value.is_valid and "path" in value else None
    if path is None or not os.path.dirname(path):
        raise ValueError(f"the row holds no image{f', only the name {quoted(path)}' if path else ''}")
    if "://" in path:
        raise ValueError(f"the row holds an address, {quoted(path)}, and no bytes")
    return (folder / path).read_bytes()


# ------------------------------------------------------------------------------------------------ what datasets wrote


def _is_plain(name: object) -> bool:
    """Whether it can name a file or folder beside."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) is not None


def _saved_files(path: Path) -> list[str]:
    """The files of a Dataset, as its state.json lists them."""
    state = _json(path)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{path}: rows are chosen by a list of indices; save it after `.flatten_indices()`")
    listed = state.get("_data_files")
    files = [file.get("filename") for file in listed if isinstance(file, dict)] if isinstance(listed, list) else []
    if not isinstance(listed, list) or not files or not all(_is_plain(file) for file in files):
        raise UserError(f"{path}: _data_files = {quoted(listed)}: no list of files beside it; {FETCH_AGAIN}")
    return [str(file) for file in files]


def _json(path: Path) -> dict[str, Any]:
    with refuse_unreadable(path, FETCH_AGAIN):
        text = read_text(path)
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error}); {FETCH_AGAIN}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: no object of JSON with keys; {FETCH_AGAIN}")
    return tree
