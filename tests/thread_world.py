"""Ranks as threads: the collectives of `ssl_dist.distributed.world.World` without processes, in milliseconds."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from ssl_dist.distributed.world import RankInfo, World
from ssl_dist.grid import Grid

TIMEOUT = 30.0
ALONE = (lambda x: x.clone(), lambda x: x[None].clone())  # sum and gather among one rank, as a BatchNorm takes them


class ThreadWorld(World):
    def __init__(self, rank, grid, rendezvous):
        super().__init__(RankInfo(rank, grid.size), grid, torch.device("cpu"))
        self._barrier, self._table = rendezvous

    def _all_gather(self, x):
        """Every rank's tensor, in the order of ranks."""
        return [tensor.clone() for tensor in self.all_gather_object(x.detach().clone())]

    def all_gather_object(self, value):
        self._table[self.rank_info.rank] = value
        self._barrier.wait(TIMEOUT)
        everything = list(self._table)
        self._barrier.wait(TIMEOUT)
        return everything

    def all_reduce_sum(self, x):
        return sum(self._all_gather(x))

    def gather(self, x):
        return torch.stack(self._all_gather(x))

    def all_reduce_sum_with_grad(self, x):
        return _Sum.apply(x, self)

    def gather_images(self, x_B):
        return torch.cat(self._all_gather(x_B)[:: self.grid.views])

    def gather_views(self, z_VBD):
        return _Gather.apply(z_VBD, self)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return world.all_reduce_sum(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.world.all_reduce_sum(grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_VBD, world):
        ctx.world, grid = world, world.grid
        parts = world._all_gather(z_VBD)
        rows = [torch.cat(parts[v :: grid.views], dim=1) for v in range(grid.views)]
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad_KMD):
        world, total = ctx.world, ctx.world.all_reduce_sum(grad_KMD)
        views = world.grid.view_range(world.rank_info.rank, total.shape[0])
        images = world.grid.image_range(world.rank_info.rank, total.shape[1])
        return total[views.start : views.stop, images.start : images.stop], None


def among(world):
    """Sum and gather among the ranks, as a BatchNorm takes them."""
    return world.all_reduce_sum, world.gather


def run(function, grid=None):
    """function(world) on every rank of the grid (default: one rank); the results in the order of ranks."""
    grid = grid or Grid(1, 1)
    rendezvous = threading.Barrier(grid.size), [None] * grid.size

    def one(rank):
        torch.set_num_threads(1)
        try:
            return function(ThreadWorld(rank, grid, rendezvous))
        except BaseException:
            rendezvous[0].abort()
            raise

    with ThreadPoolExecutor(grid.size) as pool:
        return list(pool.map(one, range(grid.size)))
