"""The reader contract: decoded images of a converted split, in the caller's order, with or without FFCV.

Both readers open the same .beton and yield the same pixels. Neither has a thread of its own, and every batch is a new
array: nothing is overwritten under whoever holds it.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from ssl_dist.data.beton import Beton
from ssl_dist.errors import UserError
from ssl_dist.thread_team import ALONE, ThreadTeam
from ssl_dist.views import RGB, Images, PixelFormat


@dataclass(frozen=True)
class SplitInfo:
    """A converted split. name: of the data set; split: of the split; mean, std: per channel, pixels in [0, 1]; pixels:
    what those of every image are."""

    name: str
    split: str
    count: int
    classes: tuple[str, ...]
    max_height: int
    max_width: int
    labelled: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str  # of every sample, see `beton.Digest`
    pixels: PixelFormat = RGB


class Reader:
    """Base of both readers; a subclass decodes. Use as a context manager, or call `close`."""

    def __init__(self, info: SplitInfo, beton: Beton):
        self.info = info
        self._beton: Beton | None = beton
        self._labels: np.ndarray | None = None

    def _decode(self, ids: np.ndarray, pixels: np.ndarray) -> None:
        """Write images `ids` (int64 [n]) into the top left of pixels[:n], [n, Hmax, Wmax, C]. Called from
        several threads at once, each with its own part of a batch."""
        raise NotImplementedError

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n], -1 unknown."""
        own = self._open_file().labels
        return (own if self._labels is None else self._labels)[self._checked(ids)]

    def replace_labels(self, labels: np.ndarray) -> None:
        """Make `labels` return these labels, int64 [N], from now on."""
        assert labels.shape == (self.info.count,), labels.shape
        self._labels = labels

    def batches(self, ids_per_step: Iterable[np.ndarray], team: ThreadTeam = ALONE) -> Generator[Images, None, None]:
        """One batch an entry of `ids_per_step` (which may be endless; it is read one entry at a time).

        Around an image its pixels are 0. The arrays belong to the caller. Raises `UserError` naming the image and the
        file when an image is damaged. The team, the thread that asks for the next batch among it, decodes.
        """
        for ids in ids_per_step:
            yield self._batch(ids, team)

    def _batch(self, ids: np.ndarray, team: ThreadTeam) -> Images:
        beton, ids = self._open_file(), self._checked(ids).copy()
        shape = (len(ids), self.info.max_height, self.info.max_width, self.info.pixels.channels)
        pixels = np.zeros(shape, self.info.pixels.dtype)
        team.run(lambda low, high: self._decode(ids[low:high], pixels[low:high]), len(ids))
        return Images(pixels, beton.heights[ids], beton.widths[ids], ids)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if ids.ndim != 1 or (ids.size and (ids.min() < 0 or ids.max() >= self.info.count)):
            raise IndexError(f"{self.info.split}: image ids must be a list of numbers in 0..{self.info.count - 1}")
        return ids

    def _open_file(self) -> Beton:
        if self._beton is None:
            raise ValueError(f"the reader of {self.info.split} is closed")
        return self._beton

    def close(self) -> None:
        """Close the file."""
        self._beton = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def damaged(beton: Beton, image_id: int, reason: str) -> UserError:
    """The error for an image whose stored bytes are not what was written."""
    return UserError(
        f"{beton.path}: image {image_id} is damaged ({reason}); "
        f"convert again: `ssl-dist convert DATASET --root SOURCE --out {beton.path.parent}`"
    )
