"""The loader: the same bytes at any thread count and shard, errors in the loop, no thread left behind."""

import threading

import numpy as np
import pytest
import torch

from ssl_dist.config import ColorJitter, RandomResizedCrop, ViewGroup
from ssl_dist.data.loader import TrainLoader
from ssl_dist.data.plan import DataOrder
from ssl_dist.grid import Grid
from ssl_dist.views import Images, view_specs

N, K, SIZE = 24, 4, 8
GROUPS = [ViewGroup(random_resized_crop=RandomResizedCrop(), horizontal_flip=0.5, color_jitter=ColorJitter())]


class Reader:
    """Random images of 12x10 in memory, behind the reader contract."""

    def __init__(self, fail_at=None):
        self.images = np.random.default_rng(0).integers(0, 256, (2 * N, 12, 10, 3), np.uint8)
        self.fail_at, self.started, self.closed = fail_at, False, False

    def labels(self, ids):
        return ids % 3

    def batches(self, ids_per_step, team):
        self.started = True
        try:
            for number, ids in enumerate(ids_per_step):
                if number == self.fail_at:
                    raise OSError("the disk is gone")
                yield Images(self.images[ids], np.full(len(ids), 12), np.full(len(ids), 10), ids)
        finally:
            self.closed = True

    def close(self):
        assert self.closed or not self.started, "closed while its batches are still being read"


def loader(reader=None, grid=None, rank=0, threads=1):
    plan = DataOrder(np.arange(0, 2 * N, 2), 8, seed=5)
    return TrainLoader(reader or Reader(), plan, view_specs(GROUPS, K, SIZE), grid or Grid(1, 1), rank, threads, False)


def collect(start=0, stop=6, **more):
    with loader(**more) as opened:
        return list(opened.batches(start, stop))


def test_batches_have_the_promised_shapes():
    batches = collect()
    assert [b.step for b in batches] == list(range(6))
    for batch in batches:
        assert batch.views[0].shape == (K, 8, 3, SIZE, SIZE) and batch.views[0].dtype == torch.uint8
        assert batch.view_ids[0].tolist() == list(range(K))
        labels, positions = batch.labels_positions
        assert torch.equal(labels, batch.image_ids % 3)
        assert torch.equal(2 * positions, batch.image_ids)
    assert not torch.equal(batches[0].views[0], batches[3].views[0])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(threads):
    for a, b in zip(collect(), collect(threads=threads), strict=True):
        assert torch.equal(a.views[0], b.views[0]) and torch.equal(a.image_ids, b.image_ids)


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2), Grid(2, 2), Grid(4, 4), Grid(8, 1)])
def test_shards_join_to_the_whole(grid):
    whole = collect()
    shards = [collect(grid=grid, rank=rank) for rank in range(grid.size)]
    for step, batch in enumerate(whole):
        for rank in range(grid.size):
            v, i = grid.view_range(rank, K), grid.image_range(rank, 8)
            part = shards[rank][step]
            assert torch.equal(part.views[0], batch.views[0][v.start : v.stop, i.start : i.stop])
            assert torch.equal(part.image_ids, batch.image_ids[i.start : i.stop])
            assert part.view_ids[0].tolist() == list(v)


def test_a_resume_in_the_middle_gets_the_remaining_batches():
    whole = collect()
    for a, b in zip(whole[4:], collect(start=4), strict=True):
        assert torch.equal(a.views[0], b.views[0])


def test_an_error_reaches_the_loop_and_every_thread_ends():
    before = threading.active_count()
    reader = Reader(fail_at=2)
    with loader(reader) as opened, pytest.raises(OSError, match="the disk is gone"):
        for _ in opened.batches(0, 6):
            pass
    assert reader.closed and threading.active_count() == before


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_ends_every_thread(taken):
    before = threading.active_count()
    reader = Reader()
    with loader(reader, threads=2) as opened:
        batches = opened.batches(0, 6)
        for _ in range(taken):
            next(batches)
    assert threading.active_count() == before


def test_batches_belong_to_the_receiver():
    batches = collect()
    copies = [b.views[0].clone() for b in batches]
    batches[0].views[0].zero_()
    for batch, copy in zip(batches[1:], copies[1:], strict=True):
        assert torch.equal(batch.views[0], copy)
