"""Sinkhorn-Knopp over the ranks: labels of a given size each, by optimal transport (Asano, Rupprecht & Vedaldi, 2020).

The transport is Q = diag(c) P^lambda diag(r), with rows that sum to 1/N and columns that sum to 1/K (Cuturi, 2013).
Each rank holds the rows of its images; only the sums of the K columns and the error are exchanged (and the columns'
largest entries once), and the rows are read once an iteration, a block that fits the cache at a time. What it needs is
the array of scores itself, float64, in place: a million images x 3,000 clusters are 24 GB over all ranks together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_dist.errors import Fault

BLOCK = {"cpu": 2**20, "cuda": 2**26}  # bytes of a block of rows: what a core's cache holds; on a GPU to fill it
FLOOR = -600.0  # logarithm of the smallest entry, where the largest of its row and column is 1; float64 ends at -708
CHECK = 10  # iterations from one look at the error to the next, as in the official code
PATIENCE = 100_000  # iterations without an end
STUCK = 600.0  # seconds in which CHECK iterations must have passed


@dataclass(frozen=True)
class Assignment:
    """labels: int64 [n], of this rank's rows. rows c [n], columns r [K]: the scales of the transport, float64, up to a
    common factor that goes from the one to the other. error: sum over all N rows of |c / c' - 1| at the last check."""

    labels: Tensor
    rows: Tensor
    columns: Tensor
    error: float
    iterations: int


@torch.no_grad()
def sinkhorn_knopp(scores_NK: Tensor, num_rows: int, lamb: float, tolerance: float, world, title: str) -> Assignment:
    """The transport of this rank's rows, float64 [n, K], to K clusters of equal size; label: the largest of a row.

    scores: logarithms of probabilities, or logits (a row may be shifted); they are overwritten by P^lambda, every row
    and column divided by its largest entry. num_rows: N, of all ranks. `title` names the work for the watchdog.

    The iterations are those of the official code: r = (1/K) / sum_n c P^lambda, c' = (1/N) / sum_k r P^lambda from
    c = 1/N on, until the error is at most `tolerance` in the iterations 1, 11, 21, ... In place of its overflow and NaN
    stand these divisions, which the scales undo, and a floor: entries below exp(-600) of the largest of their row and
    column count as that, so no row or column sums to 0. Raises `Fault` for scores that are not finite, and when there
    is no end within 100,000 iterations.
    """
    assert scores_NK.dtype == torch.float64, scores_NK.dtype
    num_columns = scores_NK.shape[1]
    c = _exponentials(scores_NK, lamb, world)
    c /= world.reduce(c.sum())
    sums = scores_NK.new_zeros(num_columns + 1)  # of the columns; the last is the error
    for part, block in _blocks(scores_NK):
        sums[:-1] += c[part] @ block
    sums = world.reduce(sums)
    iterations, error = 0, math.inf
    while True:
        with world.state.phase_of(f"Sinkhorn-Knopp {title}, iteration {iterations}", STUCK):
            for _ in range(1 if iterations == 0 else CHECK):
                r = 1 / (num_columns * sums[:-1])
                sums = world.reduce(_half_step(scores_NK, c, r, num_rows))
                iterations += 1
            error = float(sums[-1])
        if not math.isfinite(error):
            raise _agreed(f"Sinkhorn-Knopp {title}: the scores are not finite; lower optim.lr")
        if error <= tolerance:
            labels = torch.cat([(block * r).argmax(1) for _, block in _blocks(scores_NK)])
            return Assignment(labels, c, r, error, iterations)
        if iterations > PATIENCE:
            raise _agreed(
                f"Sinkhorn-Knopp {title}: the error is {error:g} after {iterations} iterations, above the tolerance "
                f"{tolerance:g}; lower lambda ({lamb:g}) or raise the tolerance"
            )


def _blocks(scores_NK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views of some rows, with their place; one at least, for a rank without rows."""
    size = max(1, BLOCK[scores_NK.device.type] // (8 * scores_NK.shape[1]))
    for start in range(0, max(1, len(scores_NK)), size):
        part = slice(start, start + size)
        yield part, scores_NK[part]


def _exponentials(scores_NK: Tensor, lamb: float, world) -> Tensor:
    """P^lambda in place, every row and then every column divided by its largest entry. Returns what the rows were
    divided by [n], up to a common factor; the first r takes the columns' divisors in."""
    divisors = scores_NK.new_empty(len(scores_NK))
    largest = scores_NK.new_full(scores_NK.shape[1:], -math.inf)
    for part, block in _blocks(scores_NK):
        block -= block.amax(1, keepdim=True)
        divisors[part] = -lamb * block.logsumexp(1)  # logarithms, from -lambda log K to 0
        largest = torch.maximum(largest, block.amax(0)) if len(block) else largest
    largest = scores_NK.new_tensor(world.everyone(largest.tolist())).amax(0)
    for _, block in _blocks(scores_NK):
        block.sub_(largest).mul_(lamb).clamp_(min=FLOOR).exp_()
    return (divisors + lamb * math.log(scores_NK.shape[1]) / 2).clamp(FLOOR, -FLOOR).exp()


def _half_step(scores_NK: Tensor, c: Tensor, r: Tensor, num_rows: int) -> Tensor:
    """Replace c by (1/N) / sum_k r P^lambda; returns the new sums of c P^lambda and of |c / c' - 1|, [K + 1]."""
    sums = scores_NK.new_zeros(scores_NK.shape[1] + 1)
    for part, block in _blocks(scores_NK):
        new = 1 / (num_rows * (block @ r))
        sums[-1] += (c[part] / new - 1).abs().sum()
        sums[:-1] += new @ block
        c[part] = new
    return sums


def _agreed(text: str) -> Fault:
    """All ranks meet it together, since what they look at is exchanged."""
    fault = Fault(text)
    fault.agreed = True
    return fault
