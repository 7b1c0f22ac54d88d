"""Batches of views, made ahead of the training loop by a background thread.

One thread reads images in the training's order, a team of threads decodes them and makes the views, and a short queue
hands them to the loop. What is handed over is owned by the receiver: no buffer is used twice. An error anywhere reaches
the loop as the same exception, behind the batches made before it; closing joins every thread and closes the reader.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_dist import views
from ssl_dist.data.plan import DataOrder
from ssl_dist.data.reader import DecodedBatch, Reader
from ssl_dist.grid import Grid
from ssl_dist.thread_team import ThreadTeam

MakeView = Callable[[DecodedBatch, ThreadTeam], np.ndarray]  # a view of every image, uint8 [B, 3, S, S]

AHEAD = 2  # batches that wait in the queue; more only hides stalls longer than two steps


@dataclass(frozen=True)
class HostBatch:
    """views: uint8 [V_local, B_local, 3, S, S] a group; view_ids: int64 [V_local] a group; ids, labels: [B_local]."""

    step: int
    views: list[Tensor]
    view_ids: list[Tensor]
    image_ids: Tensor
    labels: Tensor


class TrainLoader:
    """Iterate over the batches of steps start .. stop - 1 for one rank of the grid. Use as a context manager."""

    def __init__(
        self,
        reader: Reader,
        order: DataOrder,
        specs: list[views.ViewSpec],
        grid: Grid,
        rank: int,
        threads: int,
        pin: bool,
    ):
        self.reader, self.order, self.grid, self.rank = reader, order, grid, rank
        self.specs = specs
        self.view_ids = [
            np.array([spec.first_view + v for v in grid.view_range(rank, spec.num)], np.int64) for spec in specs
        ]
        self.threads, self.pin = threads, pin
        self._queue: queue.Queue[HostBatch | BaseException | None] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(self, start: int, stop: int) -> Iterator[HostBatch]:
        """The batches of steps start .. stop - 1. One iteration at a time."""
        assert self._thread is None, "close the loader before it is used again"
        self._thread = threading.Thread(target=self._produce, args=(start, stop), name="views", daemon=True)
        self._thread.start()
        while True:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it; batches that wait in the queue are dropped."""
        self._stop.set()
        thread, self._thread = self._thread, None
        while thread is not None and thread.is_alive():
            self._drain()
            thread.join(0.05)
        self._drain()
        self._stop.clear()
        self.reader.close()

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()

    def _put(self, item: HostBatch | BaseException | None) -> bool:
        """Hand over, unless the loader is being closed."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _produce(self, start: int, stop: int) -> None:
        ids_per_step = (self.order.local_ids(step, self.grid, self.rank) for step in range(start, stop))
        try:
            with ThreadTeam(self.threads) as team, closing(self.reader.batches(ids_per_step, team)) as decoded:
                for step, images in enumerate(decoded, start):
                    if not self._put(self._batch(step, images, team)):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _batch(self, step: int, images: DecodedBatch, team: ThreadTeam) -> HostBatch:
        epoch, image_ids = step // self.order.steps_per_epoch, images[-1]
        groups = [
            torch.from_numpy(views.make_views(*images, spec, view_ids, self.order.seed, epoch, team=team))
            for spec, view_ids in zip(self.specs, self.view_ids, strict=True)
        ]
        if self.pin:
            groups = [group.pin_memory() for group in groups]
        return HostBatch(
            step,
            groups,
            [torch.from_numpy(view_ids) for view_ids in self.view_ids],
            torch.from_numpy(np.array(image_ids, np.int64)),
            torch.from_numpy(np.array(self.reader.labels(image_ids), np.int64)),
        )


def view_batches(
    reader: Reader, ids_per_step: Iterable[np.ndarray], make_view: MakeView, threads: int
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """A view of every image, uint8 [B, 3, S, S], and the ids [B], an entry of `ids_per_step` at a time."""
    with ThreadTeam(threads) as team, closing(reader.batches(ids_per_step, team)) as decoded:
        for images in decoded:
            yield make_view(images, team), images[-1]
