"""Batches of views, made ahead of the training loop by a background thread.

One thread reads images in the training's order; with a team of threads it decodes them and makes the views. What is
handed to the loop is owned by the receiver: no buffer is used twice. An error anywhere reaches the loop as the same
exception, behind the batches made before it.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ssl_dist import views
from ssl_dist.data.plan import DataOrder
from ssl_dist.data.reader import Reader
from ssl_dist.grid import Grid
from ssl_dist.thread_team import ALONE, ThreadTeam, run_ahead

MakeView = Callable[[views.Images, ThreadTeam], np.ndarray]  # a view of every image, [B, C, S, S]

AHEAD = 3  # batches, one of them in the making; more only hides stalls longer than two steps


@dataclass(frozen=True)
class HostBatch:
    """views: uint8 or uint16 [V_local, B_local, C, S, S] a group; view_ids: int64 [V_local] a group; image_ids: int64
    [B_local]; labels_positions: int64 [2, B_local], positions among the ids that are trained on."""

    step: int
    views: list[Tensor]
    view_ids: list[Tensor]
    image_ids: Tensor
    labels_positions: Tensor


@dataclass
class TrainLoader:
    """The batches of one rank of the grid. Use as a context manager."""

    reader: Reader
    order: DataOrder
    specs: list[views.ViewSpec]
    grid: Grid
    rank: int
    threads: int
    pin: bool  # in memory that a GPU reads by itself

    def __post_init__(self) -> None:
        self.view_ids = [spec.view_ids[list(self.grid.view_range(self.rank, spec.num))] for spec in self.specs]
        self._batches: Generator[HostBatch, None, None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Batches that wait are dropped, and every thread has ended."""
        if self._batches is not None:
            self._batches.close()
        self.reader.close()

    def batches(self, start: int, stop: int) -> Iterator[HostBatch]:
        """The batches of steps start .. stop - 1. To be called once."""
        assert self._batches is None, "its batches are being read"
        self._batches = self._made_ahead(start, stop)
        return self._batches

    def _made_ahead(self, start: int, stop: int) -> Generator[HostBatch, None, None]:
        ids_per_step = (self.order.local_ids(step, self.grid, self.rank) for step in range(start, stop))
        with ThreadTeam(self.threads) as team, closing(self.reader.batches(ids_per_step, team)) as decoded:
            calls = (partial(self._next, step, decoded, team) for step in range(start, stop))
            with closing(run_ahead(calls, 1, AHEAD)) as batches:
                yield from batches

    def _next(self, step: int, decoded: Iterator[views.Images], team: ThreadTeam) -> HostBatch:
        return self.batch(step, next(decoded), team)

    def batch(self, step: int, images: views.Images, team: ThreadTeam = ALONE) -> HostBatch:
        """The batch of these images, were they those of the step."""
        epoch = step // self.order.steps_per_epoch
        groups = []
        for spec, own_ids in zip(self.specs, self.view_ids, strict=True):
            shape = (len(own_ids), len(images.ids), images.pixels.shape[3], spec.size, spec.size)
            dtype = torch.uint8 if images.pixels.dtype == np.uint8 else torch.uint16
            group = torch.empty(shape, dtype=dtype, pin_memory=self.pin)  # written once, by all threads
            views.make_views(images, spec, own_ids, self.order.seed, epoch, team, group.numpy())
            groups.append(group)
        positions = np.searchsorted(self.order.train_ids, images.ids)
        labels_positions = torch.from_numpy(np.stack([self.reader.labels(images.ids), positions]))
        if self.pin:
            labels_positions = labels_positions.pin_memory()
        view_ids = [torch.from_numpy(own_ids) for own_ids in self.view_ids]
        return HostBatch(step, groups, view_ids, torch.from_numpy(images.ids), labels_positions)


def view_batches(
    reader: Reader, ids_per_step: Iterable[np.ndarray], make_view: MakeView, threads: int
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """A view of every image, [B, C, S, S], and the ids [B], an entry of `ids_per_step` at a time."""
    with ThreadTeam(threads) as team, closing(reader.batches(ids_per_step, team)) as decoded:
        for images in decoded:
            yield make_view(images, team), images.ids
