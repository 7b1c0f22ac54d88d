"""Sinkhorn-Knopp over the ranks: labels of a given size each, by optimal transport (Asano, Rupprecht & Vedaldi, 2020).

The transport is Q = diag(c) P^lambda diag(r), with rows that sum to 1/N and columns that sum to 1/K (Cuturi, 2013).
Each rank holds the rows of its images; only the sums of the K columns and the error are exchanged (and the columns'
largest entries once). What it needs is the array of scores itself, in place: a million images x 3,000 clusters are
24 GB in float64 over all ranks together, 12 GB in float32. An iteration reads it once: as soon as a row has its new
scale it is added, scaled, to the sums of the columns.

In float32 an entry is stored as its eighth root, and raised to the 8th power in float64 where it is read: so float32,
which ends at exp(-87), holds the range of float64, each entry to 5e-7 of itself. Scales and sums are float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_dist.errors import Fault, RaisedOn
from ssl_dist.kernels.compiled import njit_sums, run_parallel
from ssl_dist.kernels.ranks import Ranks

BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**26}  # of a block of rows: what the caches hold; on a GPU to fill it
PIECE_ROWS = 1024  # rows whose sums are taken by one thread; they are added in order, so threads change no result
MIN_LOG_ENTRY = -600.0  # of the smallest entry, where the largest of its row and column is 1; float64 ends at -708
SQUARINGS = 3  # of an entry in float32 to what is meant
ROOT = 2**SQUARINGS  # of entries in float32: exp(-600 / 8) is in its range
CHECK_ITERATIONS = 10  # from one look at the error to the next, as in the official code
MAX_ITERATIONS = 100_000
CHECK_TIMEOUT_S = 600.0  # for CHECK_ITERATIONS iterations


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
def sinkhorn_knopp(
    scores_NK: Tensor, num_rows: int, lamb: float, tolerance: float, ranks: Ranks, title: str
) -> Assignment:
    """The transport of this rank's rows [n, K] to K clusters of equal size; label: the largest of a row.

    scores: logarithms of probabilities, or logits (a row may be shifted), float64 or float32. They are overwritten by
    P^lambda, every row and column divided by its largest entry; float32 by its eighth root. What float32 rounds are the
    scores, too: shift each row so that its largest is 0, which leaves the large ones exact. num_rows: N, of all ranks.
    `title` names the work for the watchdog.

    The iterations are those of the official code: r = (1/K) / sum_n c P^lambda, c' = (1/N) / sum_k r P^lambda from
    c = 1/N on, until the error is at most `tolerance` in the iterations 1, 11, 21, ... In place of its overflow and NaN
    stand these divisions, which the scales undo, and a floor: entries below exp(-600) of the largest of their row and
    column count as that, so no row or column sums to 0. Raises `Fault` for scores that are not finite, and when there
    is no end within 100,000 iterations.
    """
    assert scores_NK.dtype in (torch.float64, torch.float32), scores_NK.dtype
    num_columns = scores_NK.shape[1]
    with ranks.state.phase_of(f"the exponentials {title}", CHECK_TIMEOUT_S):
        c = _exponentials(scores_NK, lamb, ranks)
        c /= ranks.all_reduce_sum(c.sum())
        sums = scores_NK.new_zeros(num_columns, dtype=torch.float64)
        for part, block in _blocks(scores_NK):
            sums += c[part] @ _entries(block)
        sums = ranks.all_reduce_sum(sums)
    half_step = _by_loops if scores_NK.device.type == "cpu" else _by_blocks
    iterations = 0
    while True:
        with ranks.state.phase_of(f"Sinkhorn-Knopp {title}, iteration {iterations}", CHECK_TIMEOUT_S):
            for _ in range(1 if iterations == 0 else CHECK_ITERATIONS):
                r = 1 / (num_columns * sums)
                reduced = ranks.all_reduce_sum(half_step(scores_NK, c, r, num_rows))
                sums = reduced[:-1]
                iterations += 1
        error = float(reduced[-1])
        if not math.isfinite(error):
            raise Fault(f"Sinkhorn-Knopp {title}: the scores are not finite; lower optim.lr", RaisedOn.EVERY_RANK)
        if error <= tolerance:
            labels = torch.cat([(_entries(block) * r).argmax(1) for _, block in _blocks(scores_NK)])
            return Assignment(labels, c, r, error, iterations)
        if iterations > MAX_ITERATIONS:
            raise Fault(
                f"Sinkhorn-Knopp {title}: the error is {error:g} after {iterations} iterations, above the tolerance "
                f"{tolerance:g}; lower lambda ({lamb:g}) or raise the tolerance",
                RaisedOn.EVERY_RANK,
            )


def _blocks(scores_NK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views of some rows, with their place; one at least, for a rank without rows."""
    size = max(1, BLOCK_BYTES[scores_NK.device.type] // (8 * scores_NK.shape[1]))
    for start in range(0, max(1, len(scores_NK)), size):
        part = slice(start, start + size)
        yield part, scores_NK[part]


def _entries(block: Tensor) -> Tensor:
    """Entries as they are meant, float64, of a block as it is stored."""
    if block.dtype == torch.float64:
        return block
    entries = block.double()
    for _ in range(SQUARINGS):  # a power of 8 would be computed by logarithms
        entries.square_()
    return entries


def _exponentials(scores_NK: Tensor, lamb: float, ranks: Ranks) -> Tensor:
    """P^lambda in place, every row and then every column divided by its largest entry. Returns what the rows were
    divided by [n], up to a common factor; the first r takes the columns' divisors in."""
    divisors = scores_NK.new_empty(len(scores_NK), dtype=torch.float64)
    largest = scores_NK.new_full(scores_NK.shape[1:], -math.inf, dtype=torch.float64)
    for part, block in _blocks(scores_NK):
        block -= block.amax(1, keepdim=True)
        divisors[part] = -lamb * block.double().logsumexp(1)  # logarithms, from -lambda log K to 0
        largest = torch.maximum(largest, block.amax(0)) if len(block) else largest
    largest = scores_NK.new_tensor(ranks.all_gather_object(largest.tolist()), dtype=torch.float64).amax(0)
    root = 1 if scores_NK.dtype == torch.float64 else ROOT
    for _, block in _blocks(scores_NK):
        exponents = block.double().sub_(largest).mul_(lamb).clamp_(min=MIN_LOG_ENTRY)
        block.copy_(exponents.div_(root).exp_())
    return (divisors + lamb * math.log(scores_NK.shape[1]) / 2).clamp(MIN_LOG_ENTRY, -MIN_LOG_ENTRY).exp()


def _by_blocks(A_NK: Tensor, c: Tensor, r: Tensor, num_rows: int) -> Tensor:
    """Replace c by c' = (1/N) / (A r), in place; returns [K + 1] the sums of c' A over rows, and of |c / c' - 1|."""
    sums = c.new_zeros(A_NK.shape[1] + 1)
    for part, stored in _blocks(A_NK):
        block = _entries(stored)
        new = 1 / (num_rows * (block @ r))
        sums[:-1] += new @ block
        sums[-1] += (c[part] / new - 1).abs().sum()
        c[part] = new
    return sums


def _by_loops(A_NK: Tensor, c: Tensor, r: Tensor, num_rows: int) -> Tensor:
    """The same on the CPU, on as many threads as torch uses.

    A block of torch operations reads its rows twice. CPU time of an iteration, by blocks and by loops, one thread: 363
    and 199 ms for 100,000 x 3,000, 8.3 and 5.8 ms for 50,000 x 128.
    """
    num_pieces = -(-len(A_NK) // PIECE_ROWS)
    sums = np.zeros((num_pieces, A_NK.shape[1] + 1))
    kernel = _half_step if A_NK.dtype == torch.float64 else _half_step_of_roots
    run_parallel(kernel, num_pieces, A_NK.numpy(), c.numpy(), r.numpy(), num_rows, PIECE_ROWS, sums)
    return torch.from_numpy(sums.sum(0))


@njit_sums()
def _half_step(
    first: int, last: int, A: np.ndarray, c: np.ndarray, r: np.ndarray, num_rows: int, size: int, sums: np.ndarray
) -> None:
    """Pieces first..last-1 of `size` rows, float64."""
    for piece in range(first, last):
        end = min((piece + 1) * size, len(A))
        for n in range(piece * size, end, 4):
            _four_rows(A, n, min(n + 4, end) - 1, c, n, r, num_rows, sums[piece])


@njit_sums()
def _half_step_of_roots(
    first: int, last: int, A: np.ndarray, c: np.ndarray, r: np.ndarray, num_rows: int, size: int, sums: np.ndarray
) -> None:
    """The same of eighth roots, float32: four rows at a time are raised to the 8th power."""
    entries = np.empty((4, len(r)))
    for piece in range(first, last):
        end = min((piece + 1) * size, len(A))
        for n in range(piece * size, end, 4):
            stop = min(n + 4, end)
            for i in range(stop - n):
                row, entry = A[n + i], entries[i]
                for k in range(len(r)):
                    square = np.float64(row[k]) * np.float64(row[k])
                    fourth = square * square
                    entry[k] = fourth * fourth
            _four_rows(entries, 0, stop - n - 1, c, n, r, num_rows, sums[piece])


@njit_sums()
def _four_rows(
    A: np.ndarray, first: int, last: int, c: np.ndarray, n: int, r: np.ndarray, num_rows: int, own: np.ndarray
) -> None:
    """Rows first..last of A, one to four, whose scales are c[n], c[n + 1], ...: so r and the sums are read a fourth as
    often."""
    # Behind the last row stands it again, with the scale 0.
    row0, row1, row2, row3 = A[first], A[min(first + 1, last)], A[min(first + 2, last)], A[min(first + 3, last)]
    q0 = q1 = q2 = q3 = 0.0
    for k in range(len(r)):
        q0 += row0[k] * r[k]
        q1 += row1[k] * r[k]
        q2 += row2[k] * r[k]
        q3 += row3[k] * r[k]
    for i, q in enumerate((q0, q1, q2, q3)):
        if first + i <= last:
            new = 1.0 / (num_rows * q)
            own[-1] += abs(c[n + i] / new - 1.0)
            c[n + i] = new
    c0 = c[n]
    c1 = c[n + 1] if first + 1 <= last else 0.0
    c2 = c[n + 2] if first + 2 <= last else 0.0
    c3 = c[n + 3] if first + 3 <= last else 0.0
    for k in range(len(r)):
        own[k] += (c0 * row0[k] + c1 * row1[k]) + (c2 * row2[k] + c3 * row3[k])


def warm_up(dtype: torch.dtype = torch.float64) -> None:
    """Compile the loops for scores of this type: seconds the first time, then read from numba's cache."""
    one = torch.ones(1, 2, dtype=dtype)
    _by_loops(one, torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 1)
