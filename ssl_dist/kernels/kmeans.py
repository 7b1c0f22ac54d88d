"""K-means over the ranks, and the whitening before it (Caron, Bojanowski, Joulin & Douze, 2018, section 3).

Each rank holds the rows of its images. Every draw is a function of a key, and whatever decides is a sum over all rows,
in float64: the clusters do not depend on how many ranks there are, nor on whether they have GPUs.

Rounding alone differs, since sums are taken in another order: centres, which are means of the same rows, and squared
distances to them agree to 1e-13 of the rows' squared lengths. A row whose distances to two centres are as close as
that, and a draw as close to the border of two rows, can go either way. Of equal distances the first counts.
"""

import math
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist.kernels.ranks import Ranks
from ssl_dist.keys import hash64, uniforms

MIN_EIGENVALUE = 1e-6  # as a share of the largest: a dead channel's is 0, and whitening would make noise of it
BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**26}  # of distances or squares at once; a core's cache, or to fill a GPU
PASS_TIMEOUT_S = 600.0  # for one pass over the rows
MAX_RATIO = 1 - 1e-9  # of a later start to the best: rounding differs with the number of ranks and must not decide
ZERO_DISTANCE = 1e-12  # squared distances below this share of the squared lengths are 0


@torch.no_grad()
def whiten(x_ND: Tensor, dim_out: int, ranks: Ranks) -> Tensor:
    """The rows' `dim_out` largest principal components, each divided by its standard deviation, as unit vectors:
    float64 [n, dim_out] of this rank's rows [n, D]. The components are equal on all ranks, their signs arbitrary."""
    x_ND = x_ND.double()
    packed = ranks.all_reduce_sum(F.pad(x_ND.sum(0), (0, 1), value=len(x_ND)))
    count = packed[-1]
    centred = x_ND - packed[:-1] / count
    covariance = ranks.all_reduce_sum(centred.T @ centred) / count
    axes = covariance.new_zeros(len(covariance), dim_out)
    first, last = ranks.share(1)
    with ranks.state.phase_of("whitening", PASS_TIMEOUT_S):  # thousands of dimensions take a CPU a minute
        if last > first:  # one rank alone: two machines may disagree on the sign of an axis
            variances, axes = torch.linalg.eigh(covariance)
            floor = (MIN_EIGENVALUE * variances[-1]).clamp_min(torch.finfo(variances.dtype).tiny)
            axes = axes[:, -dim_out:] / variances[-dim_out:].clamp_min(floor).sqrt()
        axes = ranks.all_reduce_sum(axes.contiguous())
    return F.normalize(centred @ axes)


@torch.no_grad()
def kmeans(
    x_ND: Tensor,
    positions: Tensor,
    num_rows: int,
    num_clusters: int,
    key: np.uint64,
    ranks: Ranks,
    num_starts: int = 5,
    max_iterations: int = 30,
) -> tuple[Tensor, float]:
    """The cluster of each of this rank's rows, int64 [n], and the sum of squared distances over all rows.

    x: float64 [n, D]; positions: int64 [n], of the rows among all num_rows. The best of `num_starts` starts, each
    from k-means++ and with at most `max_iterations` iterations, as in scikit-learn. Clusters may be empty at the end.
    """
    best: tuple[Tensor, float] | None = None
    for start in range(num_starts):
        rows = _Rows(x_ND, positions, num_rows, ranks, f"k-means {start + 1} of {num_starts}")
        labels, distance = _lloyd(rows, _plus_plus(rows, num_clusters, hash64(key, start)), max_iterations)
        if best is None or distance < MAX_RATIO * best[1]:
            best = labels, distance
    assert best is not None, "num_starts is at least 1"
    return best


class _Rows:
    """The rows of all ranks; `x_ND` and `positions` are this rank's."""

    def __init__(self, x_ND: Tensor, positions: Tensor, count: int, ranks: Ranks, title: str):
        self.x_ND, self.positions, self.count, self.ranks, self.title = x_ND, positions, count, ranks, title
        largest = BLOCK_BYTES[x_ND.device.type]
        self.block_bytes = min(largest, max(BLOCK_BYTES["cpu"], x_ND.numel()))  # of few rows an eighth
        self.squares = torch.cat([block.square().sum(1) for block in x_ND.split(self.block(x_ND.shape[1]))])

    def block(self, width: int) -> int:
        """How many rows of so many float64 numbers make a block."""
        return max(1, self.block_bytes // (8 * width))

    def at(self, positions: list[int]) -> Tensor:
        """The rows at these positions, [len(positions), D], on every rank."""
        is_own = torch.tensor(positions, device=self.positions.device)[:, None] == self.positions
        index, row = is_own.nonzero(as_tuple=True)
        own_rows = self.x_ND.new_zeros(len(positions), self.x_ND.shape[1])
        own_rows[index] = self.x_ND[row]
        return self.ranks.all_reduce_sum(own_rows)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all rows [count], by position, on every rank, from those of this rank's rows [n]."""
        full = values.new_zeros(self.count)
        full[self.positions] = values
        return self.ranks.all_reduce_sum(full)

    def distances(self, centres: Tensor) -> Tensor:
        """Squared, [n, k]."""
        lengths = self.squares[:, None] + centres.square().sum(1)
        distances = torch.addmm(lengths, self.x_ND, centres.T, alpha=-2)
        return distances.masked_fill_(distances < ZERO_DISTANCE * lengths, 0)

    def nearest(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centre of every row, and the squared distance to it."""
        size = self.block(len(centres))
        squares, blocks = centres.square().sum(1), []
        for start in range(0, max(1, len(self.x_ND)), size):
            block = self.x_ND[start : start + size]
            blocks.append(torch.addmm(squares, block, centres.T, alpha=-2).min(1))
        distances, labels = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        distances += self.squares
        return labels, distances.masked_fill_(distances < ZERO_DISTANCE * (self.squares + squares[labels]), 0)

    def farthest(self, distances: Tensor, count: int) -> list[int]:
        """The positions of the rows with the largest distances; of equal ones the first."""
        values, rows = distances.topk(min(count, len(distances)))
        own = list(zip((-values).tolist(), self.positions[rows].tolist(), strict=True))
        return [position for _, position in sorted(chain.from_iterable(self.ranks.all_gather_object(own)))[:count]]


def _plus_plus(rows: _Rows, num_clusters: int, key: np.uint64) -> Tensor:
    """Centres [k, D] (Arthur & Vassilvitskii, 2007): each is drawn among the rows in proportion to the squared distance
    from those before; of several draws the one that leaves the smallest sum is taken, as in scikit-learn."""
    num_draws = 2 + int(math.log(num_clusters))
    centres = rows.at([int(rows.count * uniforms(hash64(key, 0), 1)[0])])
    distances = rows.distances(centres)[:, 0]
    for number in range(1, num_clusters):
        with rows.ranks.state.phase_of(f"{rows.title}, centre {number}", PASS_TIMEOUT_S):
            heights = np.cumsum(rows.gather(distances).cpu().numpy())
            draws = uniforms(hash64(key, number), num_draws)
            if heights[-1] > 0:
                positions = np.searchsorted(heights, draws * heights[-1], side="right")
            else:  # there are fewer different rows than clusters
                positions = draws * rows.count
            drawn = rows.at(np.minimum(positions, rows.count - 1).astype(np.int64).tolist())
            left = torch.minimum(distances[:, None], rows.distances(drawn))
            best = rows.ranks.all_reduce_sum(left.sum(0)).argmin()
            centres, distances = torch.cat([centres, drawn[best][None]]), left[:, best]
    return centres


def _lloyd(rows: _Rows, centres: Tensor, max_iterations: int) -> tuple[Tensor, float]:
    """Labels of this rank's rows and the sum of squared distances. An empty cluster starts again at the row that is
    farthest from its centre."""
    num_clusters, dim = centres.shape
    before = torch.full_like(rows.positions, -1)
    for iteration in range(max_iterations + 1):
        with rows.ranks.state.phase_of(f"{rows.title}, iteration {iteration}", PASS_TIMEOUT_S):
            labels, distances = rows.nearest(centres)
            sums = centres.new_zeros(num_clusters + 1, dim + 1)
            sums[:-1, :-1].index_add_(0, labels, rows.x_ND)
            sums[:-1, -1] = torch.bincount(labels, minlength=num_clusters)
            sums[-1, 0], sums[-1, 1] = distances.sum(), (labels != before).sum()
            sums = rows.ranks.all_reduce_sum(sums)
            if sums[-1, 1] == 0 or iteration == max_iterations:
                break
            counts = sums[:-1, -1:]
            centres, before = torch.where(counts > 0, sums[:-1, :-1] / counts, centres), labels
            empty = (counts[:, 0] == 0).nonzero()[:, 0]
            if len(empty):
                positions = rows.farthest(distances, len(empty))
                centres[empty[: len(positions)]] = rows.at(positions)
    return labels, float(sums[-1, 0])
