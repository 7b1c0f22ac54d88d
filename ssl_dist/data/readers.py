"""Open a converted data set: facts about its splits, and readers of them."""

from functools import cached_property
from pathlib import Path

import numpy as np

from ssl_dist.data import catalog, file_names, manifest
from ssl_dist.data.beton import Beton
from ssl_dist.data.reader import Reader, SplitInfo
from ssl_dist.errors import UserError
from ssl_dist.views import PixelFormat


class Dataset:
    """A converted data set, opened: dataset.json is read here, the file of a split when it is first asked for, once.

    name: refused when the data set has another one. reader: ffcv or arrays, which readers of splits are. facts: in the
    place of dataset.json. Raises `UserError`, also without a dataset.json.
    """

    is_converted = True

    def __init__(
        self, root: str | Path, name: str | None = None, reader: str = "ffcv", facts: manifest.Manifest | None = None
    ):
        self.root, self.reader = str(root), reader
        self._manifest = manifest.load(root) if facts is None else facts
        self._opened: dict[str, tuple[SplitInfo, Beton]] = {}
        self.name = self._manifest.name
        if name not in (None, self.name):
            raise UserError(
                f"data.name = {name!r}: {root} holds the data set {self.name!r}; set data.name={self.name}, "
                "or data.root"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._manifest.splits)

    @property
    def pixels(self) -> PixelFormat:
        """What those of every image are, as dataset.json says."""
        return self._manifest.encoding.pixels

    @property
    def labelled(self) -> dict[str, bool]:
        """Whether each split has a label of every image, as dataset.json says."""
        return {split: record.labelled for split, record in self._manifest.splits.items()}

    @cached_property
    def uses(self) -> catalog.SplitRoles:
        """The splits for pre-training, training and evaluation."""
        return self._manifest.uses

    def info(self, split: str) -> SplitInfo:
        """The facts about a split, whose file is compared with dataset.json."""
        return self._open(split)[0]

    def labels(self, split: str) -> np.ndarray:
        """int64 [N], -1 unknown."""
        return self._open(split)[1].labels

    def skipped(self, split: str) -> int:
        """How many images of the source `--skip-damaged` left out of a split."""
        return len(self._manifest.splits[split].skipped)

    def files(self, split: str) -> list[str] | None:
        """The path of every image's file below the source, [N], a line each (`file_names`); None: there is no list.
        Raises `UserError` for a damaged one."""
        record = self._manifest.splits[split]
        return file_names.read(file_names.path_of(self.root, split), record.count, record.files)

    def open(self, split: str) -> Reader:
        """The reader of a split; a context manager.

        Raises `UserError` for a missing, truncated or foreign file, an unknown split, a file that is not the one
        dataset.json tells of, and for the reader ffcv where FFCV can not be imported or the images are not RGB.
        """
        info, beton = self._open(split)
        if self.reader == "arrays":
            from ssl_dist.data.arrays import ArraysReader

            return ArraysReader(info, beton)
        if self.reader != "ffcv":
            raise UserError(f"data.reader = {self.reader!r}: must be ffcv or arrays")
        if not info.pixels.is_rgb:
            raise UserError(
                f"data.reader = 'ffcv': reads RGB with 8 bits, and the images of {self.root} have {info.pixels}; set "
                "data.reader=arrays"
            )
        from ssl_dist.data.ffcv_reader import FfcvReader

        return FfcvReader(info, beton)

    def _open(self, split: str) -> tuple[SplitInfo, Beton]:
        if split in self._opened:
            return self._opened[split]
        facts = self._record(split)
        beton = Beton(Path(self.root) / f"{split}.beton")
        difference = manifest.difference(beton, facts)
        if difference:
            raise UserError(
                f"{beton.path}: {difference}; convert again: `ssl-dist convert DATASET --root SOURCE --out {self.root}`"
            )
        info = SplitInfo(
            name=self.name,
            split=split,
            count=beton.count,
            classes=tuple(self._manifest.classes),
            max_height=int(beton.heights.max()),
            max_width=int(beton.widths.max()),
            labelled=bool((beton.labels >= 0).all()),
            mean=self._manifest.mean,
            std=self._manifest.std,
            sha256=facts.sha256,
            pixels=beton.pixels,
        )
        self._opened[split] = info, beton
        return info, beton

    def _record(self, split: str) -> manifest.SplitRecord:
        if split not in self.splits:
            words = " or ".join(f"data.split={name}" for name in self.splits)
            raise UserError(f"data.split = {split!r}: {self.root} holds no such split; set {words}")
        return self._manifest.splits[split]
