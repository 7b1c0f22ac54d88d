"""Ranks as threads: the exchanges of `ssl_dist.distributed.world.World` without processes, in milliseconds."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from ssl_dist.distributed.world import Place, World
from ssl_dist.grid import Grid

TIMEOUT = 30.0


class ThreadWorld(World):
    def __init__(self, rank, grid, meeting):
        super().__init__(Place(rank, grid.size), grid, torch.device("cpu"))
        self._barrier, self._table = meeting

    def _exchange(self, x):
        """Every rank's tensor, in the order of ranks."""
        return [tensor.clone() for tensor in self.everyone(x.detach().clone())]

    def everyone(self, value):
        self._table[self.place.rank] = value
        self._barrier.wait(TIMEOUT)
        everything = list(self._table)
        self._barrier.wait(TIMEOUT)
        return everything

    def reduce(self, x):
        return sum(self._exchange(x))

    def sum(self, x):
        return _Sum.apply(x, self)

    def gather_images(self, x_B, batch=None):
        return torch.cat(self._exchange(x_B)[:: self.grid.views])

    def gather_views(self, z_VBD, batch=None):
        return _Gather.apply(z_VBD, self)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return world.reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.world.reduce(grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_VBD, world):
        ctx.world, grid = world, world.grid
        parts = world._exchange(z_VBD)
        rows = [torch.cat(parts[v :: grid.views], dim=1) for v in range(grid.views)]
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad_KMD):
        world, total = ctx.world, ctx.world.reduce(grad_KMD)
        views = world.grid.view_range(world.place.rank, total.shape[0])
        images = world.grid.image_range(world.place.rank, total.shape[1])
        return total[views.start : views.stop, images.start : images.stop], None


def run(function, grid=None):
    """function(world) on every rank of the grid (default: one rank); the results in the order of ranks."""
    grid = grid or Grid(1, 1)
    meeting = threading.Barrier(grid.size), [None] * grid.size

    def one(rank):
        torch.set_num_threads(1)
        try:
            return function(ThreadWorld(rank, grid, meeting))
        except BaseException:
            meeting[0].abort()
            raise

    with ThreadPoolExecutor(grid.size) as pool:
        return list(pool.map(one, range(grid.size)))
