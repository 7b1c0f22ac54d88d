"""Which images a rank gets at a step: a pure function of (seed, epoch, step, rank), without files or state."""

from dataclasses import dataclass, field

import numpy as np

from ssl_dist.data.labels import is_whole_number
from ssl_dist.errors import UserError, quoted, refuse_unreadable
from ssl_dist.grid import Grid
from ssl_dist.keys import HELD_OUT, ORDER, hash64, permutation
from ssl_dist.reading import read_text


@dataclass
class DataOrder:
    """The order in which the training images are seen.

    train_ids: int64, the images that take part; every epoch is a permutation of them drawn from (seed, epoch), cut
    into global batches. The tail that fills no batch is dropped, a different one every epoch.
    """

    train_ids: np.ndarray
    batch_size: int
    seed: int
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.train_ids) < self.batch_size:
            raise UserError(
                f"optim.batch_size = {self.batch_size}: larger than the {len(self.train_ids)} images to train on; "
                "lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_ids) // self.batch_size

    def epoch_order(self, epoch: int) -> np.ndarray:
        """All training ids in the order of `epoch`, the dropped tail included."""
        if self._order is None or self._order[0] != epoch:
            key = hash64(self.seed, ORDER, epoch)
            self._order = (epoch, self.train_ids[permutation(key, len(self.train_ids))])
        return self._order[1]

    def global_ids(self, step: int) -> np.ndarray:
        """Image ids [M] of the global batch of `step` (steps counted from 0 over the whole training)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.epoch_order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def local_ids(self, step: int, grid: Grid, rank: int) -> np.ndarray:
        """Image ids [M / Wi] that `rank` holds at `step`."""
        shard = grid.image_range(rank, self.batch_size)
        return self.global_ids(step)[shard.start : shard.stop]


SUBSET = "data.subset"  # the setting that most choices are of


def limited(num_images: int, limit: int | None) -> np.ndarray:
    """Ids floor(i * N / limit): evenly spaced over a split of N images; all of them without a limit."""
    if limit is None or limit >= num_images:
        return np.arange(num_images, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * num_images // limit


def per_class(ids: np.ndarray, labels: np.ndarray, count: int, start: int, setting: str = SUBSET) -> np.ndarray:
    """The images number start .. start + count - 1 of every class, in id order. Raises if a class has too
    few, naming the `setting`."""
    selected = []
    for label in np.unique(labels):
        if label < 0:
            raise UserError(
                f"{setting}: per_class needs labels, and some images of this split have none; for a "
                "number of any of them: data.subset=null data.limit=1000"
            )
        members = ids[labels == label][start : start + count]
        if len(members) < count:
            raise UserError(
                f"{setting}: class {label} has {int((labels == label).sum())} images, "
                f"not the {start + count} that start = {start} and per_class = {count} need"
            )
        selected.append(members)
    return np.sort(np.concatenate(selected))


def held_out(ids: np.ndarray, labels: np.ndarray, share: float, seed: int, setting: str | None = None) -> np.ndarray:
    """About `share` of the images of every class, in id order: at least one, and at least one of them is left.

    ids, labels: int64 [n]. A function of the seed and of which images a class has, so all that is chosen or compared on
    a held-out part uses the same one. Raises for a class with one image, naming the `setting` (None: --validation).
    """
    setting = setting or f"--validation {share:g}"
    selected = []
    for label in np.unique(labels):
        members = np.sort(ids[labels == label])
        if label < 0:
            raise UserError(f"{setting}: needs labels, and {len(members)} images of this split have none")
        if len(members) < 2:
            raise UserError(f"{setting}: class {label} has one image, and needs one to learn from and one to hold out")
        count = min(max(1, int(share * len(members) + 0.5)), len(members) - 1)
        selected.append(members[permutation(hash64(seed, HELD_OUT, int(label)), len(members))[:count]])
    return np.sort(np.concatenate(selected))


def from_list(path: str, num_images: int, setting: str = SUBSET) -> np.ndarray:
    """Ids in a text file, one a line (blank lines and lines that begin with # are passed over), sorted."""
    with refuse_unreadable(f"{setting}: {path}"):
        lines = read_text(path).splitlines()
    ids = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not is_whole_number(line) or int(line) >= num_images:
            raise UserError(f"{setting}: {path} line {number}: {quoted(line)} is not an id from 0 to {num_images - 1}")
        ids.append(int(line))
    if len(set(ids)) != len(ids) or not ids:
        raise UserError(f"{setting}: {path}: " + ("holds an id twice" if ids else "holds no id"))
    return np.sort(np.array(ids, np.int64))
