"""A source of images to convert: splits, each with its images in id order."""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Labels = Sequence[int] | np.ndarray


class Images:
    """The images of a split. labels: int64 [N], -1 unknown; names: what the source calls them, [N]."""

    def __init__(self, names: Sequence[str], labels: Labels):
        self.names = names
        self.labels = np.asarray(labels, np.int64)
        assert len(self.labels) == len(names)

    def load(self, i: int) -> bytes | np.ndarray:
        """Image i: an encoded file's bytes, or pixels uint8 [H, W, 3]."""
        raise NotImplementedError

    def describe(self, i: int) -> str:
        """Image i in a message."""
        return f"image {self.names[i]} of the source"

    def listing(self) -> str:
        """SHA-256 of the names: tells whether the source still lists the same images."""
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()


class FileImages(Images):
    """Files below a folder; names are relative to it."""

    def __init__(self, folder: Path, names: Sequence[str], labels: Labels):
        super().__init__(names, labels)
        self.folder = folder

    def describe(self, i: int) -> str:
        return str(self.folder / self.names[i])

    def load(self, i: int) -> bytes:
        return (self.folder / self.names[i]).read_bytes()


class ZipImages(Images):
    """Members of an open archive below the folder `inside` it."""

    def __init__(self, archive: zipfile.ZipFile, inside: str, names: Sequence[str], labels: Labels):
        super().__init__(names, labels)
        self.archive, self.inside = archive, inside

    def describe(self, i: int) -> str:
        return f"{self.archive.filename}: {self.inside}{self.names[i]}"

    def load(self, i: int) -> bytes:
        return self.archive.read(self.inside + self.names[i])


class PixelImages(Images):
    """An array uint8 [N, H, W, 3] (mapped from a file, perhaps)."""

    def __init__(self, pixels: np.ndarray, labels: Labels):
        super().__init__([str(i) for i in range(len(pixels))], labels)
        self.pixels = pixels

    def load(self, i: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[i])


@dataclass(frozen=True)
class Source:
    classes: list[str]
    splits: dict[str, Images]
