"""The pictures of an evaluation: read images of a data set as the encoder sees them, and write figures as PNG files.

A picture is RUN/figures/<dataset>-<split>-<name>[-<layer>].png. Its own text chunks hold Title, Description (the
caption), Evaluator, Checkpoint (SHA-256) and Layer, so that showing it takes nothing but the file.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ssl_dist.config import Data
from ssl_dist.data.reader import Reader
from ssl_dist.errors import UserError
from ssl_dist.nn import features
from ssl_dist.nn.features import OUTPUT
from ssl_dist.storage import durable
from ssl_dist.storage.durable import atomic_write_or_refuse
from ssl_dist.storage.features import Features
from ssl_dist.views import shown
from ssl_dist.views.make import test_views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK_BYTES = 64 * 2**20  # of decoded images that are held at once


def add_picture(
    folder: Path, metadata: Mapping[str, str], evaluator: str, name: str, figure: "Figure", title: str, caption: str
) -> Path:
    """Write a figure, whole or not at all, in place of an older one of its name. metadata: the dataset and split that
    it shows, and of an evaluation the checkpoint and layer. Raises `UserError` when the folder cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # matplotlib takes a second

    path = _path(folder, metadata, name, "png")
    layer = metadata.get("layer", OUTPUT)
    texts = {"Title": title, "Description": caption + (f" (layer {layer})" if layer != OUTPUT else ""), "Layer": layer}
    texts |= {"Evaluator": evaluator} | ({"Checkpoint": metadata["checkpoint"]} if "checkpoint" in metadata else {})
    with atomic_write_or_refuse(path) as file:
        durable.remove_dead(path.parent)
        FigureCanvasAgg(figure).print_png(file, metadata=texts)
    return path


def _path(folder: Path, metadata: Mapping[str, str], name: str, suffix: str) -> Path:
    file_name = "-".join([metadata["dataset"], metadata["split"], name])
    name = re.sub(r"[^\w.]+", "-", file_name).strip("-")
    return folder / f"{features.named(name, metadata.get('layer', OUTPUT))}.{suffix}"


def has_pictures(folder: Path, evaluator: str, checkpoint: str, layer: str = OUTPUT) -> bool:
    """Whether the folder holds a picture by this evaluator of this checkpoint (SHA-256) and layer."""
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                texts = picture.info
        except (OSError, SyntaxError):  # a damaged one, which the next run replaces
            continue
        if (texts.get("Evaluator"), texts.get("Checkpoint"), texts.get("Layer", OUTPUT)) == (
            evaluator,
            checkpoint,
            layer,
        ):
            return True
    return False


class FigureWriter:
    """Reads images for the pictures of one evaluator and writes them; use as a context manager, or call `close`.

    folder: of the pictures; test: the split that is measured, whose data set, name and checkpoint mark the pictures;
    open_split: the reader of a split by its name, called when an image of it is first asked for; data: image_size and
    the resizing of the test transform; evaluator: its name; list_files: the files of a split's images, None: it has no
    list.
    """

    def __init__(
        self,
        folder: Path,
        test: Features,
        open_split: Callable[[str], Reader],
        data: Data,
        evaluator: str,
        list_files: Callable[[str], list[str] | None] = lambda split: None,
    ) -> None:
        self.folder = folder
        self._list_files, self._files = list_files, dict[str, list[str] | None]()
        self._metadata, self._open_split, self._data, self._evaluator = test.metadata, open_split, data, evaluator
        self._readers: dict[str, Reader] = {}
        self._choice = ""  # what pictures show of the images, in words

    def images(self, part: Features, rows: np.ndarray) -> np.ndarray:
        """The images of these rows of `part`, int64 [n], by the test transform and not normalised: uint8 [n, S, S, 3],
        of other images than RGB what `views.shown` makes of them.

        `part` may be a piece of a split, named split[...]: its image ids are those of the split. Raises `UserError`
        for a damaged image, and when the split is not the one that the features are of.
        """
        ids, inverse = np.unique(part.image_ids[rows], return_inverse=True)
        reader = self._reader_of(part)
        size = self._data.image_size
        out, info = np.empty((len(ids), size, size, 3), np.uint8), reader.info
        step = max(1, _BLOCK_BYTES // (info.pixels.num_bytes * info.max_height * info.max_width))
        self._choice = self.choice(part)
        blocks = [ids[start : start + step] for start in range(0, len(ids), step)]
        done = 0
        for images in reader.batches(blocks):
            views = test_views(images, size, self._data.eval_resize, self._data.eval_interpolation)  # [n, C, S, S]
            if not info.pixels.is_rgb:
                views = shown.shown(views, info.mean, info.std)
            out[done : done + len(views)] = views.transpose(0, 2, 3, 1)
            done += len(views)
        return out[inverse]

    def choice(self, part: Features) -> str:
        """What pictures show of the images of `part`, in words; empty: the images are RGB."""
        return shown.words(self._reader_of(part).info.pixels)

    def _reader_of(self, part: Features) -> Reader:
        split = part.metadata["split"].partition("[")[0]
        if split not in self._readers:
            reader = self._readers[split] = self._open_split(split)
            if reader.info.sha256 != part.metadata["data"]:
                raise UserError(
                    f"{part.source}: features of other images than the split {split} of {reader.info.name} has now;"
                    " extract again"
                )
        return self._readers[split]

    def add(self, name: str, figure: "Figure", title: str, caption: str, part: Features | None = None) -> Path:
        """Write the figure, see `add_picture`. part: the split that it shows, where that is not the measured one."""
        metadata = self._metadata if part is None else part.metadata
        caption += f" ({self._choice})" if self._choice else ""
        return add_picture(self.folder, metadata, self._evaluator, name, figure, title, caption)

    def add_page(self, name: str, parts: Iterable[str], part: Features) -> str:
        """Write an HTML page about a split, whole or not at all, beside the figures; returns its path below the run.
        parts: its text in pieces, which are not held together. Raises `UserError` when the folder cannot be written."""
        path = _path(self.folder, part.metadata, name, "html")
        with atomic_write_or_refuse(path) as file:
            for text in parts:
                file.write(text.encode())
        return f"{self.folder.name}/{path.name}"

    def add_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]], part: Features) -> str:
        """Write a CSV file about a split, whole or not at all, beside the figures; returns its path below the run.
        Raises `UserError` when the folder cannot be written."""
        path = _path(self.folder, part.metadata, name, "csv")
        with atomic_write_or_refuse(path) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
            table = csv.writer(text, lineterminator="\n")
            table.writerow(columns)
            table.writerows(rows)
            text.detach()
        return f"{self.folder.name}/{path.name}"

    def files(self, part: Features, rows: np.ndarray) -> list[str]:
        """The file of each of these rows of `part`, int64 [n], as a line of <split>-files.txt; empty where the data set
        has no such list."""
        split = part.metadata["split"].partition("[")[0]
        if split not in self._files:
            self._files[split] = self._list_files(split)
        files = self._files[split]
        return [""] * len(rows) if files is None else [files[image] for image in part.image_ids[rows].tolist()]

    def close(self) -> None:
        """Close the readers that were opened."""
        while self._readers:
            self._readers.popitem()[1].close()

    def __enter__(self) -> "FigureWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
