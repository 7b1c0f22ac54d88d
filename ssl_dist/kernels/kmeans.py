"""K-means over the ranks, and the whitening before it (Caron, Bojanowski, Joulin & Douze, 2018, section 3).

Each rank holds the rows of its images. Every draw is a function of a key, and whatever decides is a sum over all rows,
in float64: the clusters do not depend on how many ranks there are.
"""

import math
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist.keys import hash64, uniforms

FLOOR = 1e-6  # of the largest eigenvalue: a dead channel's is 0, and whitening would make noise of it
BLOCK = {"cpu": 2**20, "cuda": 2**26}  # bytes of distances that are held at once; a core's cache, or to fill a GPU
STUCK = 600.0  # seconds that one pass over the rows may take
LESS = 1 - 1e-9  # a later start must be better by more than rounding, which is another on every number of ranks
SAME = 1e-12  # squared distances below this share of the squared lengths are 0


@torch.no_grad()
def whiten(x_ND: Tensor, dim_out: int, world) -> Tensor:
    """The rows' `dim_out` largest principal components, each divided by its standard deviation, as unit vectors:
    float64 [n, dim_out] of this rank's rows [n, D]. The components are equal on all ranks, their signs arbitrary."""
    x_ND = x_ND.double()
    packed = world.all_reduce_sum(F.pad(x_ND.sum(0), (0, 1), value=len(x_ND)))
    count = packed[-1]
    centred = x_ND - packed[:-1] / count
    covariance = world.all_reduce_sum(centred.T @ centred) / count
    axes = covariance.new_zeros(len(covariance), dim_out)
    first, last = world.share(1)
    with world.state.phase_of("whitening", STUCK):  # thousands of dimensions take a CPU a minute
        if last > first:  # one rank alone: two machines may disagree on the sign of an axis
            variances, axes = torch.linalg.eigh(covariance)
            floor = (FLOOR * variances[-1]).clamp_min(torch.finfo(variances.dtype).tiny)
            axes = axes[:, -dim_out:] / variances[-dim_out:].clamp_min(floor).sqrt()
        axes = world.all_reduce_sum(axes.contiguous())
    return F.normalize(centred @ axes)


@torch.no_grad()
def kmeans(
    x_ND: Tensor,
    positions: Tensor,
    num_rows: int,
    num_clusters: int,
    key: np.uint64,
    world,
    num_starts: int = 5,
    max_iterations: int = 30,
) -> tuple[Tensor, float]:
    """The cluster of each of this rank's rows, int64 [n], and the sum of squared distances over all rows.

    x: float64 [n, D]; positions: int64 [n], the rows' places among all num_rows. The best of `num_starts` starts, each
    from k-means++ and with at most `max_iterations` iterations, as in scikit-learn. Clusters may be empty at the end.
    """
    best: tuple[Tensor, float] | None = None
    for start in range(num_starts):
        rows = _Rows(x_ND, positions, num_rows, world, f"k-means {start + 1} of {num_starts}")
        found = _lloyd(rows, _plus_plus(rows, num_clusters, hash64(key, start)), max_iterations)
        if best is None or found[1] < LESS * best[1]:
            best = found
    return best


class _Rows:
    """All rows, of which each rank has its own."""

    def __init__(self, x_ND: Tensor, positions: Tensor, count: int, world, title: str):
        self.x_ND, self.positions, self.count, self.world, self.title = x_ND, positions, count, world, title
        self.squares = x_ND.square().sum(1)

    def at(self, places: list[int]) -> Tensor:
        """The rows at these places, [len(places), D], on every rank."""
        own = torch.tensor(places, device=self.positions.device)[:, None] == self.positions
        which, row = own.nonzero(as_tuple=True)
        found = self.x_ND.new_zeros(len(places), self.x_ND.shape[1])
        found[which] = self.x_ND[row]
        return self.world.all_reduce_sum(found)

    def everywhere(self, values: Tensor) -> Tensor:
        """What each rank has of its rows [n], of all rows [count], on every rank."""
        full = values.new_zeros(self.count)
        full[self.positions] = values
        return self.world.all_reduce_sum(full)

    def distances(self, centres: Tensor) -> Tensor:
        """Squared, [n, k]."""
        lengths = self.squares[:, None] + centres.square().sum(1)
        distances = torch.addmm(lengths, self.x_ND, centres.T, alpha=-2)
        return distances.masked_fill_(distances < SAME * lengths, 0)

    def nearest(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centre of every row, and the squared distance to it."""
        size = max(1, BLOCK[centres.device.type] // (8 * len(centres)))
        squares, found = centres.square().sum(1), []
        for start in range(0, max(1, len(self.x_ND)), size):
            block = self.x_ND[start : start + size]
            found.append(torch.addmm(squares, block, centres.T, alpha=-2).min(1))
        distances, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        distances += self.squares
        return labels, distances.masked_fill_(distances < SAME * (self.squares + squares[labels]), 0)

    def farthest(self, distances: Tensor, count: int) -> list[int]:
        """The places of the rows with the largest distances; of equal ones the first."""
        values, rows = distances.topk(min(count, len(distances)))
        own = list(zip((-values).tolist(), self.positions[rows].tolist(), strict=True))
        return [place for _, place in sorted(chain.from_iterable(self.world.all_gather_object(own)))[:count]]


def _plus_plus(rows: _Rows, num_clusters: int, key: np.uint64) -> Tensor:
    """Centres [k, D] (Arthur & Vassilvitskii, 2007): each is drawn among the rows in proportion to the squared distance
    from those before; of several draws the one that leaves the smallest sum is taken, as in scikit-learn."""
    num_draws = 2 + int(math.log(num_clusters))
    centres = rows.at([int(rows.count * uniforms(hash64(key, 0), 1)[0])])
    distances = rows.distances(centres)[:, 0]
    for number in range(1, num_clusters):
        with rows.world.state.phase_of(f"{rows.title}, centre {number}", STUCK):
            heights = np.cumsum(rows.everywhere(distances).cpu().numpy())
            draws = uniforms(hash64(key, number), num_draws)
            if heights[-1] > 0:
                places = np.searchsorted(heights, draws * heights[-1], side="right")
            else:  # there are fewer different rows than clusters
                places = draws * rows.count
            drawn = rows.at(np.minimum(places, rows.count - 1).astype(np.int64).tolist())
            left = torch.minimum(distances[:, None], rows.distances(drawn))
            best = rows.world.all_reduce_sum(left.sum(0)).argmin()
            centres, distances = torch.cat([centres, drawn[best][None]]), left[:, best]
    return centres


def _lloyd(rows: _Rows, centres: Tensor, max_iterations: int) -> tuple[Tensor, float]:
    """Labels of this rank's rows and the sum of squared distances. An empty cluster begins anew at the row that is
    farthest from its centre."""
    num_clusters, dim = centres.shape
    before = torch.full_like(rows.positions, -1)
    for iteration in range(max_iterations + 1):
        with rows.world.state.phase_of(f"{rows.title}, iteration {iteration}", STUCK):
            labels, distances = rows.nearest(centres)
            sums = centres.new_zeros(num_clusters + 1, dim + 1)
            sums[:-1, :-1].index_add_(0, labels, rows.x_ND)
            sums[:-1, -1] = torch.bincount(labels, minlength=num_clusters)
            sums[-1, 0], sums[-1, 1] = distances.sum(), (labels != before).sum()
            sums = rows.world.all_reduce_sum(sums)
            if sums[-1, 1] == 0 or iteration == max_iterations:
                break
            counts = sums[:-1, -1:]
            centres, before = torch.where(counts > 0, sums[:-1, :-1] / counts, centres), labels
            empty = (counts[:, 0] == 0).nonzero()[:, 0]
            if len(empty):
                places = rows.farthest(distances, len(empty))
                centres[empty[: len(places)]] = rows.at(places)
    return labels, float(sums[-1, 0])
