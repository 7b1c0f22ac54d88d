"""Weighted k-nearest-neighbour classification (Wu et al., CVPR 2018; as in DINO and SFRIK; T is self-label's sigma).

Rows are L2-normalised; an image's k nearest training images by cosine vote for their class with weight exp(cos / T);
the class with the largest sum is predicted. Every test image counts once, whatever their number.

Ties have a fixed order: of equal cosines the lower image id is the nearer; of equal votes the lower class index comes
first, and so do, in the top-5, classes without any vote (where the official codes leave the order to an unstable sort).
Cosines are rounded, so in fp32 images closer together than about 1e-7 may change places with the memory budget.
"""

import logging
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import torch
from numba import njit
from pydantic import Field
from torch import Tensor

from ssl_dist.config import PositiveInt, Section
from ssl_dist.errors import UserError
from ssl_dist.evaluators.accuracy import target_rank
from ssl_dist.evaluators.album import Album
from ssl_dist.evaluators.confusion import add_pictures, class_names
from ssl_dist.features_file import Features, check_pair, require_labels

PROTOCOL = (
    "weighted kNN: L2-normalised features, cosine, votes exp(cos/T), number of neighbours and T (0.07 unless given) as"
    " named, all test images, {precision}"
)
DRAWS = True
_PUBLISHED_K = (20, 200)
_PUBLISHED_TEMPERATURE = 0.07

# Below 0.005 the weights exp(cos / T) would leave float64's range.
Temperature = Annotated[float, Field(ge=0.005, allow_inf_nan=False)]


class Options(Section):
    k: Annotated[list[PositiveInt], Field(min_length=1)] | None = Field(
        None,
        description="list of neighbour counts; null: 20 and 200, without those above the number of training images",
    )
    temperature: Annotated[list[Temperature], Field(min_length=1)] = Field(
        [_PUBLISHED_TEMPERATURE], description="list of T in the votes exp(cos / T), each at least 0.005"
    )
    precision: Literal["fp32", "fp64"] = Field("fp32", description="of the cosines; votes are always summed in fp64")
    memory_mb: PositiveInt = Field(512, description="MiB for blocks of rows and cosines; less is slower")


def run(train: Features, test: Features, options: Options, album: Album | None = None) -> dict[str, float]:
    """Percent correct: `knn<k>_top1` and `knn<k>_top5` for every k, `knn<k>_T<t>_top1` for a T other than 0.07.

    Top-5 counts the first min(5, k) classes, as the official codes do. Pictures are of the largest k and the first T.
    Raises `UserError` for files that do not belong together, missing labels, fewer than two classes and a k above the
    number of training images.
    """
    check_pair(train, test)
    require_labels(train, test)
    counts = _neighbour_counts(options.k, train)
    train_labels_N, test_labels_N = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    num_classes = max(len(train.classes), int(train.labels.max()) + 1, int(test.labels.max()) + 1)
    dtype = torch.float64 if options.precision == "fp64" else torch.float32
    correct, predicted_N = {}, np.zeros(len(test), np.int64)
    for start, cosine_QK, row_QK in neighbours(train, test, max(counts), dtype, options.memory_mb << 20, num_classes):
        labels_QK = train_labels_N[row_QK]
        targets_Q = test_labels_N[start : start + len(row_QK)]
        for k in counts:
            for temperature in options.temperature:
                votes_QC = votes(cosine_QK[:, :k], labels_QK[:, :k], temperature, num_classes)
                rank_Q = target_rank(votes_QC, targets_Q)
                for top, limit in ((1, 1), (5, min(5, k))):
                    name = _name(k, temperature, top)
                    correct[name] = correct.get(name, 0) + int((rank_Q < limit).sum())
                if album is not None and (k, temperature) == (counts[-1], options.temperature[0]):
                    predicted_N[start : start + len(row_QK)] = votes_QC.numpy().argmax(1)  # of equals the first
    if album is not None:
        add_pictures(album, test, class_names(test, train), predicted_N, "knn", f"kNN with {counts[-1]} neighbours")
    return {name: number * 100.0 / len(test) for name, number in correct.items()}


def votes(cosine_QK: Tensor, labels_QK: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Sum of exp(cos / T) over the neighbours of each class: [Q, K], int64 [Q, K] -> float64 [Q, C]."""
    votes_QC = torch.zeros(len(cosine_QK), num_classes, dtype=torch.float64)
    return votes_QC.scatter_add_(1, labels_QK, (cosine_QK.double() / temperature).exp())


def neighbours(
    train: Features, test: Features, k: int, dtype: torch.dtype, memory: int, num_classes: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The k nearest training rows of the test rows, block by block: (first test row, cosine [Q, k], row int64 [Q, k]).

    k is at most the number of training rows. Nearest first, equal cosines in rising order of rows; a row of zeros has
    cosine 0 with everything. A block of queries meets the training rows in blocks and keeps a running best k, so that
    about `memory` bytes are used for files of any length; `num_classes` reserves room for the caller's votes.
    """
    num_queries, num_rows = _block_sizes(train.dim, k, dtype.itemsize, memory, num_classes)
    for start in range(0, len(test), num_queries):
        queries_QD = _unit_rows(test, start, min(start + num_queries, len(test)), dtype)
        best_QK = torch.full((len(queries_QD), k), -torch.inf, dtype=dtype)
        row_QK = torch.zeros(len(queries_QD), k, dtype=torch.int64)
        for first in range(0, len(train), num_rows):
            bank_RD = _unit_rows(train, first, min(first + num_rows, len(train)), dtype)
            _keep_best((queries_QD @ bank_RD.T).numpy(), first, best_QK.numpy(), row_QK.numpy())
        row_QK, order_QK = row_QK.sort(dim=1)
        best_QK, order_QK = best_QK.gather(1, order_QK).sort(dim=1, descending=True, stable=True)
        yield start, best_QK, row_QK.gather(1, order_QK)


@njit(cache=True, nogil=True)
def _keep_best(cosine_QR, first, best_QK, row_QK):
    """Bring rows first, first+1, ... into each query's k best, a heap with the farthest neighbour at its root.

    One comparison for most rows, unlike a top-k of every block. Rows come in rising order, so a row that only equals
    the root is the farther one and stays out; of equal cosines in the heap the highest row is the farthest.
    """
    k = best_QK.shape[1]
    for q in range(cosine_QR.shape[0]):
        best, row = best_QK[q], row_QK[q]
        for column in range(cosine_QR.shape[1]):
            cosine = cosine_QR[q, column]
            if cosine <= best[0]:
                continue
            here, child = 0, 1
            while child < k:
                other = child + 1
                if other < k and (
                    best[other] < best[child] or (best[other] == best[child] and row[other] > row[child])
                ):
                    child = other
                if cosine <= best[child]:  # the new row is the highest of all, so the farthest of its equals
                    break
                best[here], row[here] = best[child], row[child]
                here, child = child, 2 * child + 1
            best[here], row[here] = cosine, first + column


def _unit_rows(part: Features, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    rows_RD = torch.from_numpy(part.rows(start, stop)).to(dtype)
    norm_R1 = torch.linalg.vector_norm(rows_RD, dim=1, keepdim=True, dtype=torch.float64)
    return rows_RD.div_(norm_R1.where(norm_R1 > 0, 1.0).to(dtype))


def _block_sizes(dim: int, k: int, itemsize: int, memory: int, num_classes: int) -> tuple[int, int]:
    """Test and training rows of a block. The training file is read once for every block of queries."""
    per_row = dim * (itemsize + 5)  # as read, normalised, and a byte for the check that it is finite
    per_query = per_row + 4 * k * (itemsize + 8) + 12 * num_classes
    num_queries = max(1, min(memory // 2 // per_query, int((memory / itemsize) ** 0.5 / 2)))
    num_rows = max(1, (memory - num_queries * per_query) // (per_row + num_queries * itemsize))
    return num_queries, num_rows


def _neighbour_counts(wanted: list[int] | None, train: Features) -> list[int]:
    """The k to evaluate, rising. Only the default leaves out what a small training set cannot give, and says so."""
    counts = sorted(set(wanted or _PUBLISHED_K))
    fitting = [k for k in counts if k <= len(train)]
    if fitting == counts:
        return counts
    if wanted is not None or not fitting:
        raise UserError(
            f"knn.k = {counts[-1] if wanted else 'null'}: {train.source} has {len(train)} images;"
            f" give knn.k=[...] with numbers up to {len(train)}"
        )
    left_out = ", ".join(str(k) for k in counts if k > len(train))
    logging.getLogger(__name__).warning(
        "knn: k = %s left out, since %s has only %d images", left_out, train.source, len(train)
    )
    return fitting


def _name(k: int, temperature: float, top: int) -> str:
    suffix = "" if temperature == _PUBLISHED_TEMPERATURE else f"_T{temperature:g}"
    return f"knn{k}{suffix}_top{top}"
