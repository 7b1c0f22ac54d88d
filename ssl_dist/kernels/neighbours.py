"""The k nearest rows by cosine, block by block in bounded memory, and their weighted votes (Wu et al., CVPR 2018).

Ties have a fixed order: of equal cosines the lower row is the nearer.

On the CPU cosines are rounded, so in float32 rows closer together than about 1e-7 may change places with the memory
budget (1e-15 in float64).

On a GPU they are those of `exact_cosines`, so neighbours and their order are a function of the rows alone: equal rows
have equal cosines, and no device, block or thread decides. Hence they are also the CPU's, in the CPU's order, but for
rows whose cosines differ by less than the CPU rounds; these lie in the order of their exact cosines.
"""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssl_dist.device import CPU
from ssl_dist.kernels.compiled import run_parallel
from ssl_dist.kernels.exact_cosines import cosines, lengths, slices
from ssl_dist.numba_cache import njit

MULTIPLIED = 1024, 2048  # queries and rows: their cosines are read again while they are in the cache
SCANNED = 64  # rows that are compared at once: a number that is known makes vectors of the loop


class RowBlocks(Protocol):
    """Rows of features [N, D] that are read block by block, such as `storage.features.Features`."""

    @property
    def dim(self) -> int: ...

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A copy of rows start .. stop-1, float32 [stop - start, D]."""


def votes(cosine_QK: Tensor, labels_QK: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Sum of exp(cos / T) over the neighbours of each class: [Q, K], int64 [Q, K] -> float64 [Q, C]."""
    votes_QC = torch.zeros(len(cosine_QK), num_classes, dtype=torch.float64)
    return votes_QC.scatter_add_(1, labels_QK, (cosine_QK.double() / temperature).exp())


def neighbours(
    train: RowBlocks,
    test: RowBlocks,
    k: int,
    dtype: torch.dtype,
    memory: int,
    num_classes: int = 0,
    device: torch.device = CPU,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The k nearest training rows of the test rows, block by block: (first test row, cosine [Q, k], row int64 [Q, k]),
    on the host, whichever device computes them.

    k is at most the number of training rows. Nearest first, equal cosines in rising order of rows; a row of zeros has
    cosine 0 with everything. A block of queries is compared with the training rows in blocks and keeps a running best
    k, so that about `memory` bytes are used, of the host's memory and of the device's, for files of any length;
    `num_classes` reserves room for votes.
    """
    search = _rounded_neighbours if device.type == "cpu" else partial(_exact_neighbours, device=device)
    return search(train, test, k, dtype, memory, num_classes)


def _rounded_neighbours(
    train: RowBlocks, test: RowBlocks, k: int, dtype: torch.dtype, memory: int, num_classes: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """By cosines of `dtype` on the CPU."""
    num_queries, num_rows = _block_sizes(train.dim, k, dtype.itemsize, memory, num_classes)
    num_at_once, num_rows = min(num_queries, MULTIPLIED[0]), min(num_rows, MULTIPLIED[1])
    products = torch.empty(min(num_at_once, len(test)) * min(num_rows, len(train)), dtype=dtype)
    for start in range(0, len(test), num_queries):
        queries_QD = unit_rows(test, start, min(start + num_queries, len(test)), dtype)
        best_QK = torch.full((len(queries_QD), k), -torch.inf, dtype=dtype)
        row_QK = torch.zeros(len(queries_QD), k, dtype=torch.int64)
        for first in range(0, len(train), num_rows):
            bank_RD = unit_rows(train, first, min(first + num_rows, len(train)), dtype)
            parts = (tensor.split(num_at_once) for tensor in (queries_QD, best_QK, row_QK))
            for some_QD, best, rows in zip(*parts, strict=True):
                out = products[: len(some_QD) * len(bank_RD)].view(-1, len(bank_RD))
                cosine_QR = torch.mm(some_QD, bank_RD.T, out=out)
                run_parallel(_keep_best, len(some_QD), cosine_QR.numpy(), first, best.numpy(), rows.numpy())
        row_QK, order_QK = row_QK.sort(dim=1)
        best_QK, order_QK = best_QK.gather(1, order_QK).sort(dim=1, descending=True, stable=True)
        yield start, best_QK, row_QK.gather(1, order_QK)


@njit(cache=True, nogil=True)
def _keep_best(low: int, high: int, cosine_QR: np.ndarray, first: int, best_QK: np.ndarray, row_QK: np.ndarray) -> None:
    """Bring rows first, first+1, ... into the k best of queries low .. high-1, each a heap with the farthest neighbour
    at its root.

    One comparison for most rows, `SCANNED` of them at once, unlike a top-k of every block. Rows come in rising order,
    so a row that only equals the root is the farther one and stays out; of equal cosines in the heap the highest row
    is the farthest.
    """
    for q in range(low, high):
        best, cosines_R, start = best_QK[q], cosine_QR[q], 0
        while start < len(cosines_R):
            scanned, root, num_nearer = cosines_R[start : start + SCANNED], best[0], np.int32(0)
            if len(scanned) == SCANNED:
                for i in range(SCANNED):
                    num_nearer = np.int32(num_nearer + np.int32(scanned[i] > root))
            if num_nearer or len(scanned) < SCANNED:
                for i in range(len(scanned)):
                    if scanned[i] > best[0]:
                        _replace_root(best, row_QK[q], scanned[i], first + start + i)
            start += SCANNED


@njit(cache=True, nogil=True)
def _replace_root(best: np.ndarray, row: np.ndarray, cosine: float, new_row: int) -> None:
    k, here, child = len(best), 0, 1
    while child < k:
        other = child + 1
        if other < k and (best[other] < best[child] or (best[other] == best[child] and row[other] > row[child])):
            child = other
        if cosine <= best[child]:  # the new row is the highest of all, so the farthest of its equals
            break
        best[here], row[here] = best[child], row[child]
        here, child = child, 2 * child + 1
    best[here], row[here] = cosine, new_row


def unit_rows(part: RowBlocks, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start .. stop-1 of length 1, [stop - start, D]; a row of zeros stays one, with cosine 0 to everything."""
    rows_RD = torch.from_numpy(part.rows(start, stop)).to(dtype)
    return rows_RD.div_(lengths(rows_RD).to(dtype))


def _block_sizes(dim: int, k: int, itemsize: int, memory: int, num_classes: int) -> tuple[int, int]:
    """Test and training rows of a block. The training file is read once for every block of queries."""
    per_row = dim * (itemsize + 5)  # as read, normalised, and a byte for the check that it is finite
    per_query = per_row + 4 * k * (itemsize + 8) + 12 * num_classes
    num_queries = max(1, min(memory // 2 // per_query, int((memory / itemsize) ** 0.5 / 2)))
    num_rows = max(1, (memory - num_queries * per_query) // (per_row + num_queries * itemsize))
    return num_queries, num_rows


# -------------------------------------------------------------------------------------------------- on a GPU


def _exact_neighbours(
    train: RowBlocks,
    test: RowBlocks,
    k: int,
    dtype: torch.dtype,
    memory: int,
    num_classes: int,
    device: torch.device,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """By cosines that no device rounds, within D 2^-50 of the exact ones, for float32 within sqrt(D) 2^-25."""
    number = 1 if dtype == torch.float32 else 2
    num_queries, num_rows = _exact_block_sizes(train.dim, k, memory, num_classes)
    for start in range(0, len(test), num_queries):
        rows_QD = torch.from_numpy(test.rows(start, min(start + num_queries, len(test))))
        queries = slices(rows_QD, number, device)
        best_QK = torch.empty(len(rows_QD), 0, dtype=torch.float64, device=device)
        row_QK = torch.empty(len(rows_QD), 0, dtype=torch.int64, device=device)
        for first in range(0, len(train), num_rows):
            rows_RD = torch.from_numpy(train.rows(first, min(first + num_rows, len(train))))
            cosine_QR = cosines(queries, slices(rows_RD, number, device))
            chosen_QK = largest(cosine_QR, min(k, len(rows_RD)))
            best_QK = torch.cat([best_QK, cosine_QR.gather(1, chosen_QK)], 1)
            row_QK = torch.cat([row_QK, chosen_QK + first], 1)
            chosen_QK = largest(best_QK, min(k, best_QK.shape[1]))  # rows rise along best_QK, so this keeps the lower
            best_QK, row_QK = best_QK.gather(1, chosen_QK), row_QK.gather(1, chosen_QK)
        best_QK, order_QK = best_QK.sort(dim=1, descending=True, stable=True)
        yield start, best_QK.to("cpu", dtype), row_QK.gather(1, order_QK).cpu()


def largest(values_QN: Tensor, k: int) -> Tensor:
    """Where the k largest values of every row [Q, N] stand, int64 [Q, k] rising; of equal values the first ones.

    `topk` itself promises nothing of equal values. But the k-th largest value is one number, and among ranks of
    positions, with what is above it before what equals it, no two are equal.
    """
    num_columns = values_QN.shape[1]
    kth_Q1 = values_QN.topk(k, dim=1).values[:, -1:]
    rank_N = torch.arange(num_columns, 0, -1, dtype=torch.int32, device=values_QN.device)
    rank_QN = torch.where(values_QN == kth_Q1, rank_N, 0)
    rank_QN = torch.where(values_QN > kth_Q1, rank_N + num_columns, rank_QN)
    return rank_QN.topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def _exact_block_sizes(dim: int, k: int, memory: int, num_classes: int) -> tuple[int, int]:
    """Test and training rows of a block, as `_block_sizes`."""
    per_row = dim * 24  # as read and in two slices, one of which is made of what the other leaves
    per_pair = 20  # cosine, and two ranks of its position with what they are chosen by
    per_query = per_row + 8 * k * 16 + 12 * num_classes
    num_queries = max(1, min(memory // 2 // per_query, int((memory / per_pair) ** 0.5 / 2)))
    num_rows = max(1, (memory - num_queries * per_query) // (per_row + num_queries * per_pair))
    return num_queries, num_rows
