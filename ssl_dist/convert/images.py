"""A source of images to convert: splits, each with its images in id order."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

Labels = Sequence[int] | np.ndarray
Loader = Callable[[], bytes | np.ndarray]  # gives an encoded file's bytes, or pixels uint8 [H, W, 3]


class Images:
    """The images of a split. labels: int64 [N], -1 unknown; names: what the source calls them, [N]."""

    def __init__(self, names: Sequence[str], labels: Labels):
        self.names = names
        self.labels = np.asarray(labels, np.int64)
        assert len(self.labels) == len(names)

    def load(self, i: int) -> bytes | np.ndarray:
        """Image i: an encoded file's bytes, or pixels uint8 [H, W, 3]."""
        raise NotImplementedError

    def loaders(self, count: int) -> Iterator[list[Loader]]:
        """What loads each image, in id order, at most `count` at a time. A source that can be read in order alone has
        read these when it hands them out; they may be called in other threads."""
        ids = range(len(self.names))
        for start in ids[::count]:
            yield [partial(self.load, i) for i in ids[start : start + count]]

    def files(self) -> Sequence[str] | None:
        """The paths of the images' files below the source, [N]; None: they have none of their own."""
        return None

    def describe(self, i: int) -> str:
        """Image i in a message."""
        return f"image {self.names[i]} of the source"

    def listing(self) -> str:
        """SHA-256 of the names: tells whether the source still lists the same images."""
        return _sha256(self.names)

    def stamps(self) -> str | None:
        """SHA-256 of what changes whenever an image is replaced, and may change without, asked of the source without
        reading the images; None: nothing is known but the images themselves."""
        return None


class FileImages(Images):
    """Files below a folder; names are relative to it."""

    def __init__(self, folder: Path, names: Sequence[str], labels: Labels):
        super().__init__(names, labels)
        self.folder = folder

    def files(self) -> Sequence[str]:
        return self.names

    def describe(self, i: int) -> str:
        return str(self.folder / self.names[i])

    def load(self, i: int) -> bytes:
        return (self.folder / self.names[i]).read_bytes()

    def stamps(self) -> str:
        return stamps_of(self.folder, self.names)


class ZipImages(Images):
    """Members of an open archive below the folder `inside` it."""

    def __init__(self, archive: zipfile.ZipFile, inside: str, names: Sequence[str], labels: Labels):
        super().__init__(names, labels)
        self.archive, self.inside = archive, inside

    def files(self) -> Sequence[str]:
        return self.names

    def describe(self, i: int) -> str:
        return f"{self.archive.filename}: {self.inside}{self.names[i]}"

    def load(self, i: int) -> bytes:
        return self.archive.read(self.inside + self.names[i])

    def stamps(self) -> str:
        """Of name, size and checksum of every member."""
        members = {member.filename: member for member in self.archive.infolist()}
        found = ((name, members.get(self.inside + name)) for name in self.names)
        return _sha256(f"{name}\0{member and (member.file_size, member.CRC)}" for name, member in found)


class PixelImages(Images):
    """An array uint8 [N, H, W, 3] (mapped from a file, perhaps)."""

    def __init__(self, pixels: np.ndarray, labels: Labels):
        super().__init__([str(i) for i in range(len(pixels))], labels)
        self.pixels = pixels

    def load(self, i: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[i])


@dataclass(frozen=True)
class Source:
    """left_out: what lies there and is not converted, a line a reason; notes: what is converted and may be meant
    otherwise, a line each."""

    classes: list[str]
    splits: dict[str, Images]
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()


def stamps_of(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 of name, size, times of the last change (of the contents; of them or the entry) and inode of every file.

    The time of an entry can not be set by programs, and a folder that takes another's name brings other inodes.
    """
    return _sha256(_stamp(folder, name) for name in names)


def _stamp(folder: Path, name: str) -> str:
    try:
        state = os.stat(folder / name)
    except OSError as error:  # a link to nothing, say: reading it tells
        return f"{name}\0{error.errno}"
    return f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\0{state.st_ino}"


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
