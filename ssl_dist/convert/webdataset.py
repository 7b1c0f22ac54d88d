"""WebDataset: shards of plain tar, in which the members with one name up to the first dot make a sample."""

import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_dist.convert.classes import Label, source_of
from ssl_dist.convert.images import Images, Labels, Source, stamps_of
from ssl_dist.convert.shards import CLASS_NAMES, find, refuse_compressed, refuse_unfetched
from ssl_dist.convert.walk import EXTENSIONS
from ssl_dist.errors import UserError, quoted, refuse_unreadable
from ssl_dist.reading import open_regular, parse_json, read_text

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and what follows the first dot of the file's name
META = re.compile(r"__[^/]*__(/|$)")  # of the shard, not of a sample
PICKLED = ("pyd", "pkl", "pickle", "pth", "pt")
MAX_LABEL_BYTES = 1 << 24  # of a member that holds a label
BLOCK = tarfile.BLOCKSIZE
DAMAGED = (tarfile.TarError, ValueError, OverflowError, EOFError)  # what tarfile raises
LINKS = "members that are links, folders or sparse files"
NO_SAMPLE = "members whose names make no sample"
PICKLES = "members with pickled objects, which are never opened"
OTHERS = "other members of samples"


@dataclass
class _Sample:
    """members: extension, in lower case -> the name in the tar, offset and size of the contents in bytes."""

    key: str
    members: dict[str, tuple[str, int, int]]


class _Ignored:
    """What of the shards is not converted: reason -> the number of each kind."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def add(self, reason: str, kind: str) -> None:
        self.counts.setdefault(reason, Counter())[kind] += 1

    def rest(self, sample: _Sample, image: str, label_key: str | None) -> None:
        """The members of a sample that are neither its image nor its label."""
        label = "cls" if label_key is None else "json"
        for extension, (name, _, _) in sample.members.items():
            if name != image and extension != label:
                is_pickled = extension.rpartition(".")[2] in PICKLED
                self.add(PICKLES if is_pickled else OTHERS, f".{extension}")

    def lines(self) -> list[str]:
        return [
            f"{reason}: {', '.join(f'{number} {kind}' for kind, number in kinds.most_common(10))}"
            for reason, kinds in self.counts.items()
        ]


class ShardImages(Images):
    """Images in tars. place: shard and, in it, offset and size in bytes, int64 [N, 3]; missing: position -> why the
    sample has no image."""

    def __init__(
        self,
        folder: Path,
        shards: Sequence[str],
        stamps: str,
        names: Sequence[str],
        place: np.ndarray,
        missing: dict[int, str],
        labels: Labels,
    ):
        super().__init__(names, labels)
        self.folder, self.shards, self.place, self.missing = folder, shards, place, missing
        self._stamps = stamps

    def files(self) -> Sequence[str]:
        return self.names

    def describe(self, i: int) -> str:
        return str(self.folder / self.names[i])

    def load(self, i: int) -> bytes:
        if i in self.missing:
            raise ValueError(self.missing[i])
        shard, offset, size = self.place[i].tolist()
        with open(self.folder / self.shards[shard], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise ValueError("the shard was cut meanwhile")
        return data

    def stamps(self) -> str:
        """Of the shards, before they were read."""
        return self._stamps


def webdataset(
    root: Path,
    unlabeled: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
    extensions: tuple[str, ...] = EXTENSIONS,
) -> Source:
    """Every sample of the shards that `shards.find` finds, in the order of the shards' names and then of the tar.

    The image is the member with one of the extensions, or image_key; the label the whole number in .cls, or
    the number or name under label_key in .json; without either the images have none. classnames.txt beside the
    shards, one a line, names the classes. Nothing is unpickled. Raises `UserError` for a shard that is no whole plain
    tar, a key that comes twice in one, two images in a sample, and a label that is none.
    """
    shards = find(root, ".tar", unlabeled)
    image_keys = [key.removeprefix(".") for key in (extensions if image_key is None else (image_key.lower(),))]
    reader = _Reader(shards.folder, image_keys, unlabeled, label_key)
    splits: dict[str, Images] = {}
    labels: dict[str, list[Label]] = {}
    for split, files in shards.splits.items():
        splits[split], labels[split] = reader.read(files)
    if not any(label is not None for own in labels.values() for label in own):
        reader.notes += reader.hints
    class_names = None if unlabeled else _class_names(shards.folder / CLASS_NAMES)
    left_out = [*reader.ignored.lines(), *shards.left_out.lines()]
    return source_of(splits, labels, class_names, root, left_out, reader.notes)


class _Reader:
    """Reads the splits of a source. image_keys: extensions of images. ignored, notes: what is not read, and what is
    odd; hints: where labels may be that no sample has in a .cls."""

    def __init__(self, folder: Path, image_keys: Sequence[str], unlabeled: bool, label_key: str | None):
        self.folder, self.image_keys, self.unlabeled, self.label_key = folder, image_keys, unlabeled, label_key
        self.ignored, self.notes, self.hints = _Ignored(), list[str](), list[str]()

    def read(self, files: Sequence[str]) -> tuple[ShardImages, list[Label]]:
        """The images of these shards and their labels, or None for all."""
        stamps = stamps_of(self.folder, files)
        names, place, missing, labels = list[str](), array("q"), dict[int, str](), list[Label]()
        remedy = ""
        for number, file in enumerate(files):
            path = self.folder / file
            samples, notes = _scan(path, self.ignored)
            self.notes += notes
            if samples and not names:  # the first of them stands for all
                remedy = _remedy(samples[0])
                self.hints = self.hints if self.unlabeled or self.hints else _hints(path, samples[0])
            for sample in samples:
                chosen = _image(path, sample, self.image_keys)
                if chosen is None:
                    missing[len(names)] = f"the sample holds no image, only .{', .'.join([*sample.members][:8])}"
                name, offset, size = chosen or (sample.key, 0, 0)
                self.ignored.rest(sample, name, self.label_key)
                names.append(f"{file}/{name}")
                place.extend((number, offset, size))
            labels += [None] * len(samples) if self.unlabeled else _labels(path, samples, self.label_key)
        if not names:
            found = "".join(f" ({line})" for line in self.ignored.lines())
            raise UserError(f"{self.folder / files[0]}: holds no sample{found}; give tars of images and their labels")
        if len(missing) == len(names):
            raise UserError(f"{self.folder / names[0]}: {missing[0]}; {remedy}")
        if not self.unlabeled:
            self._require_all_or_no_labels(names, labels)
        places = np.frombuffer(place, np.int64).reshape(-1, 3)
        unknown = np.full(len(names), -1)
        return ShardImages(self.folder, files, stamps, names, places, missing, unknown), labels

    def _require_all_or_no_labels(self, names: Sequence[str], labels: list[Label]) -> None:
        lacking = labels.count(None)
        if lacking and (lacking < len(labels) or self.label_key is not None):
            first, kind = self.folder / names[labels.index(None)], ".cls" if self.label_key is None else ".json"
            raise UserError(
                f"{first}: has no {kind}, as {lacking} of {len(labels)} samples of its split; give them one, or leave "
                "all labels with --unlabeled"
            )


def _scan(path: Path, ignored: _Ignored) -> tuple[list[_Sample], list[str]]:
    """The samples of a shard, in order, and what is odd about it."""
    samples, keys, notes = list[_Sample](), set[str](), list[str]()
    for name, offset, size in _members(path, ignored, notes):
        if META.match(name) or (match := MEMBER.fullmatch(name)) is None:
            ignored.add(NO_SAMPLE, os.path.splitext(name)[1].lower() or "without a suffix")
            continue
        key, extension = match[1], match[2].lower()
        if not samples or samples[-1].key != key:
            if key in keys:
                raise UserError(
                    f"{path}: {name}: the sample {quoted(key)} stands in two places of the shard; write it with all "
                    "members of a sample together, as `tar --sort=name` does"
                )
            keys.add(key)
            samples.append(_Sample(key, {}))
        if extension in samples[-1].members:
            raise UserError(f"{path}: {name}: the sample {quoted(key)} has two of it; write the shard with one")
        samples[-1].members[extension] = name, offset, size
    return samples, notes


def _members(path: Path, ignored: _Ignored, notes: list[str]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the contents of every file in a plain tar that is whole."""
    last = "its begin"
    with refuse_unreadable(path, "make it readable or remove it"), open_regular(path) as file:
        start = file.read(BLOCK)
        refuse_unfetched(path, start)
        refuse_compressed(path, start)
        file.seek(0)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is closed here
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # of all in a large tar, gigabytes
                last = member.name
                if member.size < 0:
                    raise tarfile.ReadError("a size below 0")  # which would lead back to what was read
                if member.isreg() and not member.issparse():
                    yield last, member.offset_data, member.size
                else:
                    ignored.add(LINKS, "in all")
        except DAMAGED as error:
            raise UserError(f"{path}: no whole tar: {error or 'damaged'}, at {last}; fetch it again") from None
        file.seek(tar.offset)
        block = file.read(BLOCK)
        if block != bytes(len(block)) or 0 < len(block) < BLOCK:
            raise UserError(f"{path}: no whole tar: damaged or cut behind {last}; fetch it again")
        if not block:
            notes.append(f"{path}: has no mark of a tar's end behind {last}; was it fetched whole?")
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                notes.append(f"{path}: bytes behind the tar's end are not read; join tars with `tar --concatenate`")
                break


def _image(path: Path, sample: _Sample, image_keys: Sequence[str]) -> tuple[str, int, int] | None:
    """Name, offset and size of the image; None: the sample has none."""
    found = [extension for extension in sample.members if extension in image_keys]
    if len(found) > 1:
        raise UserError(
            f"{path}: the sample {quoted(sample.key)} holds {len(found)} images, .{' and .'.join(found)}; name one: "
            f"--image-key {found[0]}"
        )
    return sample.members[found[0]] if found else None


def _remedy(sample: _Sample) -> str:
    """For shards without images."""
    if "tar" in sample.members:
        return "unpack these tars, too, for example to <class>/ for `ssl-dist convert folder`"
    if "npy" in sample.members:
        return "--channels N reads arrays of images"
    like = next((extension for extension in sample.members if f".{extension}".endswith(EXTENSIONS)), None)
    if like is None:
        return "give shards of images"
    return f"a name ends at its first dot: rename the members, or take --image-key {like}"


def _labels(path: Path, samples: Sequence[_Sample], label_key: str | None) -> list[Label]:
    """The label of every sample; None: it has none."""
    labels = list[Label]()
    with refuse_unreadable(path), open_regular(path) as file:
        for sample in samples:
            member = sample.members.get("cls" if label_key is None else "json")
            if member is None:
                labels.append(None)
                continue
            name, offset, size = member
            data = os.pread(file.fileno(), min(size, MAX_LABEL_BYTES), offset)
            labels.append(_number(path, name, data) if label_key is None else _of_json(path, name, data, label_key))
    return labels


def _number(path: Path, name: str, data: bytes) -> int:
    text = data[:64].decode("ascii", "replace").strip()
    if not re.fullmatch(r"-1|\d{1,18}", text, re.ASCII):
        raise UserError(
            f"{path}: {name}: the label {quoted(text)} is no whole number from 0; take one from the .json with "
            "--label-key, or leave all with --unlabeled"
        )
    return int(text)


def _of_json(path: Path, name: str, data: bytes, label_key: str) -> Label:
    tree = _tree(data)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {name}: no JSON with keys; leave all labels with --unlabeled")
    if label_key not in tree:
        raise UserError(f"{path}: {name}: has no --label-key {quoted(label_key)}, but {', '.join(tree) or 'nothing'}")
    value = tree[label_key]
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and value < -1):
        what = f"{label_key} = {quoted(value)}: neither a number from 0 nor a name"
        raise UserError(f"{path}: {name}: {what}; give another --label-key")
    return value


def _tree(data: bytes) -> Any:
    """The value of a .json; None: it is none."""
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError:
        return None


def _hints(path: Path, sample: _Sample) -> list[str]:
    """Where labels may be that samples do not have in a .cls: by the first of a shard."""
    hints = []
    if "json" in sample.members:
        _, offset, size = sample.members["json"]
        with refuse_unreadable(path), open_regular(path) as file:
            tree = _tree(os.pread(file.fileno(), min(size, MAX_LABEL_BYTES), offset))
        if isinstance(tree, dict):
            keys = ", ".join(tree)
            hints.append(f"no sample has a label in .cls; --label-key takes one of the keys of the .json: {keys}")
    if folder := os.path.dirname(sample.key.removeprefix("./")):
        hints.append(f"samples lie in folders, {folder}/ for one; where these are classes, unpack for `convert folder`")
    return hints


def _class_names(path: Path) -> list[str] | None:
    """Names of the classes, one a line, as clip_benchmark puts them beside shards; None: there are none."""
    if not path.is_file():
        return None
    with refuse_unreadable(path, "write it as UTF-8 or remove it"):
        names = [line.strip() for line in read_text(path).splitlines()]
    while names and not names[-1]:
        names.pop()
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: the class {quoted(twice)} stands twice; give every class a name of its own")
    return names
