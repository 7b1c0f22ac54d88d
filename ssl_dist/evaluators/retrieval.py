"""Instance retrieval: every test image ranks the images of a gallery by the cosine of their features.

Measured is how near the images of the query's class are: whether any of the k nearest is one (top-k), the share of the
k nearest that are (precision at k), and the mean over queries of the average precision of the whole ranked list,
    AP = 1/R sum_{i=1..R} i / rank_i,     rank_i: place of the i-th of the R images of the query's class
which is scikit-learn's `average_precision_score` where no two cosines are equal.

Cosines are computed in float64 and rounded to multiples of 2^-30 (1e-9); of equal ones the lower row is the nearer. So
images that are alike have one order, which depends neither on blocks nor on threads, and is the same on a GPU: there
the cosines are those of `kernels.exact_cosines`, which differ from the CPU's by about 1e-15 (D 2^-50 at the most), so
that one may be rounded to the next multiple, and images that are 2e-9 apart change places. The values of a query whose
class the gallery lacks are 0.

Of a split alone every image is a query among the others. Without classes what is left are the cosine of the nearest
image, on average over the queries, the pictures and the list of the queries' nearest images.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_dist.config import PositiveInt, Section
from ssl_dist.device import CPU
from ssl_dist.errors import UserError
from ssl_dist.kernels.exact_cosines import cosines, slices
from ssl_dist.kernels.neighbours import unit_rows
from ssl_dist.keys import EVALUATION, hash64, permutation
from ssl_dist.numba_cache import njit
from ssl_dist.results.accuracy import neighbour_counts
from ssl_dist.results.confusion import add_pictures, class_names
from ssl_dist.results.figures import FigureWriter
from ssl_dist.results.sampling import evenly
from ssl_dist.storage.features import Features, check_pair, have_classes

PROTOCOL = (
    "retrieval: every test image ranks all other images of the {gallery} split by cosine; top-k: any of the k nearest"
    " has its class; precision@k: share of them that has; map: mean average precision of the whole list"
)
VERSION = 2
DRAWS = True
_ROW_MASK = np.uint64(0xFFFFFFFF)  # the part of a key that is the gallery's row
_OWN_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)  # the key of a query itself, behind all others
_LAST_KEY = 2**63 - 1  # on a GPU, where keys are int64
_PUBLISHED_K = (1, 5, 10, 20)
_NUM_SHOWN = 10  # nearest images of a query in the picture and in the list
_NUM_LISTED = 10_000  # queries in the list


class Options(Section):
    gallery: Literal["train", "test"] = Field(
        "train", description="what is searched: the training images, or the other test images"
    )
    k: Annotated[list[PositiveInt], Field(min_length=1)] | None = Field(
        None,
        description="list of k for top-k and precision at k; null: 1, 5, 10 and 20, without those above the number "
        "of images that are searched",
    )
    queries: PositiveInt = Field(20, description="queries in the picture, half of them failures")
    seed: int = Field(0, description="which queries the picture shows")
    memory_mb: PositiveInt = Field(
        512, description="MiB for rankings; the gallery's file is read once for every block of queries that fits"
    )


def protocol_without_labels(_options: Options) -> str:
    """The sentence for a split that has no classes."""
    return "retrieval: every image ranks all other images of its split by cosine; that of the nearest, on average"


def run(
    train: Features,
    test: Features,
    options: Options,
    writer: FigureWriter | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`retrieval_top<k>` and, for k above 1, `retrieval_precision<k>`, and `retrieval_map`, in percent; of a split
    alone that has no classes `retrieval_nearest_cosine`.

    Raises `UserError` for files that do not belong together, missing labels, fewer than two classes and a k above the
    number of images that are searched.
    """
    check_pair(train, test)
    leave_out = options.gallery == "test" or train is test
    gallery = test if leave_out else train
    if not have_classes(train, test):
        return _without_classes(test, options, writer, device or CPU)
    num_found = len(gallery) - leave_out
    counts = neighbour_counts(options.k, _PUBLISHED_K, num_found, "retrieval.k", gallery.source)
    num_hits = {k: 0 for k in counts}  # queries with an image of their class among the k nearest
    num_relevant = {k: 0 for k in counts}  # such images, over all queries
    precision_N = np.zeros(len(test))
    nearest = _Nearest.empty(len(test), min(_NUM_SHOWN, num_found))
    for start, keys_QN in rankings(test, gallery, leave_out, options.memory_mb << 20, device or CPU):
        for query, keys_N in enumerate(keys_QN, start):
            rows_N = (keys_N & _ROW_MASK).astype(np.int64)
            rank_R = np.flatnonzero(gallery.labels[rows_N] == test.labels[query])
            for k in counts:
                number = int(np.searchsorted(rank_R, k))
                num_relevant[k] += number
                num_hits[k] += number > 0
            precision_N[query] = average_precision(rank_R)
        nearest.put(start, keys_QN)
    _warn_of_missing(test, gallery, leave_out)
    if writer is not None:
        _draw(writer, test, gallery, nearest, precision_N, options)
    values = {f"retrieval_top{k}": num_hits[k] * 100.0 / len(test) for k in counts}
    values |= {
        f"retrieval_precision{k}": num_relevant[k] * 100.0 / (k * len(test)) for k in counts if k > 1
    }  # 1: top-1
    return values | {"retrieval_map": float(precision_N.mean() * 100)}


class _Nearest(NamedTuple):
    """The nearest images of every query, the nearest first: rows int64 [N, k] of the gallery, and cosines [N, k]."""

    rows_NK: np.ndarray
    cosine_NK: np.ndarray

    @classmethod
    def empty(cls, num_queries: int, k: int) -> Self:
        return cls(np.zeros((num_queries, k), np.int64), np.zeros((num_queries, k)))

    def put(self, start: int, keys_QN: np.ndarray) -> None:
        """What a block of `rankings` says of its queries."""
        keys_QK = keys_QN[:, : self.rows_NK.shape[1]]
        block = slice(start, start + len(keys_QK))
        self.rows_NK[block] = (keys_QK & _ROW_MASK).astype(np.int64)
        self.cosine_NK[block] = 1.0 - (keys_QK >> np.uint64(32)) * 2.0**-30


def _without_classes(
    test: Features, options: Options, writer: FigureWriter | None, device: torch.device
) -> dict[str, float]:
    if len(test) < 2:
        raise UserError(f"{test.source}: one image has no other to find; give a split of more")
    nearest = _Nearest.empty(len(test), min(_NUM_SHOWN, len(test) - 1))
    for start, keys_QN in rankings(test, test, True, options.memory_mb << 20, device):
        nearest.put(start, keys_QN)
    if writer is not None:
        _draw_without_classes(writer, test, nearest, options)
    return {"retrieval_nearest_cosine": float(nearest.cosine_NK[:, 0].mean())}


def average_precision(rank_R: np.ndarray) -> float:
    """From the places of a query's own class in the ranked list, counted from 0 and rising; 0 without any."""
    return float((np.arange(1, len(rank_R) + 1) / (rank_R + 1)).mean()) if len(rank_R) else 0.0


def rankings(
    queries: Features, gallery: Features, leave_out: bool, memory: int, device: torch.device = CPU
) -> Iterator[tuple[int, np.ndarray]]:
    """Block by block the first query, and keys uint64 [Q, N] of the gallery's rows, which are their lower 32 bits, the
    nearest first.

    leave_out: queries and gallery are one split, and a query is left out of its own list ([Q, N - 1]). About `memory`
    bytes are used, of the host's memory and of the device's; one query at a time needs about 50 a row of the gallery.
    The next block overwrites the keys.
    """
    rank = _rankings_on_cpu if device.type == "cpu" else partial(_rankings_on_gpu, device=device)
    return rank(queries, gallery, leave_out, memory)


def _rankings_on_cpu(
    queries: Features, gallery: Features, leave_out: bool, memory: int
) -> Iterator[tuple[int, np.ndarray]]:
    threads = torch.get_num_threads()
    num_queries, num_rows = _block_sizes(len(gallery), gallery.dim, memory)
    with ThreadPoolExecutor(threads, "rank") as pool:
        keys_QN = np.empty((min(num_queries, len(queries)), len(gallery)), np.uint64)
        for start in range(0, len(queries), num_queries):
            stop = min(start + num_queries, len(queries))
            queries_QD = unit_rows(queries, start, stop, torch.float64)
            block_QN = keys_QN[: stop - start]
            for first in range(0, len(gallery), num_rows):
                last = min(first + num_rows, len(gallery))
                cosine_QR = (queries_QD @ unit_rows(gallery, first, last, torch.float64).T).numpy()
                _fill(cosine_QR, first, block_QN)
            if leave_out:
                block_QN[np.arange(stop - start), np.arange(start, stop)] = _OWN_KEY
            for _ in pool.map(np.ndarray.sort, block_QN):  # a row each; numpy sorts in place and without the GIL
                pass
            yield start, block_QN[:, : len(gallery) - leave_out]


@njit(cache=True, nogil=True)
def _fill(cosine_QR: np.ndarray, first: int, keys_QN: np.ndarray) -> None:
    """Keys of rows first, first+1, ...: a number that rises as the cosine falls, then the row."""
    for q in range(cosine_QR.shape[0]):
        for r in range(cosine_QR.shape[1]):
            distance = np.uint64(max(0.0, np.rint((1.0 - cosine_QR[q, r]) * 2.0**30)))
            keys_QN[q, first + r] = (distance << np.uint64(32)) | np.uint64(first + r)


def _block_sizes(num_gallery: int, dim: int, memory: int) -> tuple[int, int]:
    """Queries of a block, and rows of the gallery that they are compared with at once."""
    per_row = dim * 13  # as read, in float64, and a byte for the check that it is finite
    lists = 32 * num_gallery  # rows and labels of the one that is measured
    num_queries = max(1, (memory * 5 // 8 - lists) // (8 * num_gallery + per_row))
    num_rows = max(1, memory // 8 // (per_row + 8 * num_queries))
    return num_queries, num_rows


def _rankings_on_gpu(
    queries: Features, gallery: Features, leave_out: bool, memory: int, device: torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """Keys are int64 there, 2^62 below those of the host, and sorted some queries at a time: a sort takes four times
    its keys."""
    num_queries, num_rows, num_sorted = _block_sizes_on_gpu(len(gallery), gallery.dim, memory)
    keys_QN = torch.empty(min(num_queries, len(queries)), len(gallery), dtype=torch.int64, device=device)
    for start in range(0, len(queries), num_queries):
        stop = min(start + num_queries, len(queries))
        ours, block_QN = _two_slices(queries, start, stop, device), keys_QN[: stop - start]
        for first in range(0, len(gallery), num_rows):
            last = min(first + num_rows, len(gallery))
            distance_QR = cosines(ours, _two_slices(gallery, first, last, device)).neg_().add_(1).mul_(2.0**30)
            block_QR = block_QN[:, first:last]
            block_QR.copy_(distance_QR.round_().clamp_min_(0))
            block_QR.sub_(2**30).mul_(2**32).add_(torch.arange(first, last, device=device))
        if leave_out:
            block_QN.scatter_(1, torch.arange(start, stop, device=device)[:, None], _LAST_KEY)
        for begin in range(0, stop - start, num_sorted):
            sorted_SN = block_QN[begin : begin + num_sorted].sort(dim=1).values.cpu().numpy().view(np.uint64)
            sorted_SN += np.uint64(2**62)
            yield start + begin, sorted_SN[:, : len(gallery) - leave_out]


def _two_slices(part: Features, start: int, stop: int, device: torch.device) -> tuple[Tensor, ...]:
    return slices(torch.from_numpy(part.rows(start, stop)), 2, device)


def _block_sizes_on_gpu(num_gallery: int, dim: int, memory: int) -> tuple[int, int, int]:
    """Queries of a block, rows of the gallery that they are compared with at once, and queries sorted at once."""
    per_row = dim * 24  # as read and in two slices, one of which is made of what the other leaves
    num_queries = max(1, memory * 3 // 8 // (8 * num_gallery + per_row))
    num_rows = max(1, memory // 4 // (per_row + 16 * num_queries))
    num_sorted = max(1, memory * 3 // 8 // (48 * num_gallery))  # keys and indices, each twice while they are sorted
    return num_queries, num_rows, min(num_queries, num_sorted)


def _warn_of_missing(test: Features, gallery: Features, leave_out: bool) -> None:
    number = np.bincount(gallery.labels, minlength=int(test.labels.max()) + 1)[test.labels] - leave_out
    if missing := int((number == 0).sum()):
        logging.getLogger(__name__).warning(
            "retrieval: %d of %d queries have a class of which %s has no image to find; they count as 0",
            missing, len(test), gallery.source,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------- pictures


def _draw(
    writer: FigureWriter,
    test: Features,
    gallery: Features,
    nearest: _Nearest,
    precision_N: np.ndarray,
    options: Options,
) -> None:
    from ssl_dist.results import charts  # matplotlib takes a second

    names, nearest_NK = class_names(test, gallery), nearest.rows_NK
    predicted_N = gallery.labels[nearest_NK[:, 0]]
    add_pictures(writer, test, names, predicted_N, _name(options), "the nearest image")
    right_N = predicted_N == test.labels
    panels = []
    for is_right, relation in ((True, "the same"), (False, "another")):
        rows = _queries(test.labels, right_N == is_right, options)
        title = f"nearest image of {relation} class ({(right_N == is_right).mean() * 100:.1f} % of queries)"
        if len(rows):
            panels.append((title, [_row(writer, test, gallery, row, nearest_NK[row], names) for row in rows]))
    searched = f"{len(gallery):,} images of {gallery.metadata['dataset']} {gallery.metadata['split']}"
    writer.add(
        f"{_name(options)}-nearest",
        charts.neighbours(panels),
        "Queries and their nearest images",
        f"Images of {test.metadata['dataset']} {test.metadata['split']} and, by falling cosine of their features, the"
        f" nearest among {searched}"
        f"{' other than themselves' if gallery is test else ''}. Green, solid frames: the query's class; red, dashed"
        " frames: another one, named below. Left queries whose nearest image is of their class, right those where it is"
        f" not, chosen evenly over the classes by key (seed {options.seed}), not by hand. Mean average precision"
        f" {precision_N.mean() * 100:.2f} %. {_listed(writer, test, gallery, nearest, options)}",
    )


def _draw_without_classes(writer: FigureWriter, test: Features, nearest: _Nearest, options: Options) -> None:
    from ssl_dist.results import charts  # matplotlib takes a second

    num_queries = max(1, options.queries // 2)
    drawn = np.sort(permutation(hash64(options.seed, EVALUATION), len(test))[:num_queries])
    panels = [
        (title, [_row_without_classes(writer, test, row, nearest) for row in rows])
        for title, rows in (
            ("the most similar images", _most_similar(nearest, num_queries)),
            ("images that are drawn by key", drawn),
        )
    ]
    writer.add(
        f"{_name(options)}-nearest",
        charts.neighbours(panels, framed=False),
        "Images and their nearest images",
        f"Images of {test.metadata['dataset']} {test.metadata['split']}, which has no classes, and, by falling cosine"
        " of their features, the nearest of its other images; a number is that cosine. Left those with the highest,"
        f" and none that a row above shows; right images drawn by key (seed {options.seed}), not by hand."
        f" {_listed(writer, test, test, nearest, options)}",
    )


def _most_similar(nearest: _Nearest, number: int) -> list[int]:
    """Queries by the falling cosine of their nearest image; none that a query before it finds."""
    chosen: list[int] = []
    found: set[int] = set()
    for query in np.argsort(-nearest.cosine_NK[:, 0], kind="stable").tolist():
        if query not in found and len(chosen) < number:
            chosen.append(query)
            found.update(nearest.rows_NK[query].tolist())
    return chosen


def _row_without_classes(
    writer: FigureWriter, test: Features, query: int, nearest: _Nearest
) -> tuple[np.ndarray, list[str]]:
    """The images of a query and of its nearest rows; its file or id, and their cosines."""
    rows = np.array([query, *nearest.rows_NK[query]])
    file = PurePosixPath(writer.files(test, rows[:1])[0]).stem
    cosines = [f"{cosine:.3f}" for cosine in nearest.cosine_NK[query]]
    return writer.images(test, rows), [file or str(test.image_ids[query]), *cosines]


def _listed(writer: FigureWriter, test: Features, gallery: Features, nearest: _Nearest, options: Options) -> str:
    """Write the list of the queries' nearest images; says where it is, for a caption."""
    files, searched = (writer.files(part, np.arange(len(part))) for part in (test, gallery))
    count = min(len(test), _NUM_LISTED)
    rows = (
        (test.image_ids[query], files[query], place, gallery.image_ids[row], searched[row], f"{cosine:.6f}")
        for query in range(count)
        for place, (row, cosine) in enumerate(
            zip(nearest.rows_NK[query].tolist(), nearest.cosine_NK[query].tolist(), strict=True), 1
        )
    )
    columns = ("image_id", "file", "place", "nearest_id", "nearest_file", "cosine")
    which = "All queries" if count == len(test) else f"The first {count:,} queries"
    return f"{which}: {writer.add_table(f'{_name(options)}-nearest', columns, rows, test)}."


def _name(options: Options) -> str:
    return "retrieval" if options.gallery == "train" else "retrieval-within"


def _queries(labels: np.ndarray, eligible: np.ndarray, options: Options) -> np.ndarray:
    """Half of the picture's queries, in the order of their labels."""
    rows = np.flatnonzero(eligible)
    key = hash64(options.seed, EVALUATION)
    chosen = rows[evenly(labels[rows], max(1, options.queries // 2), key)]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def _row(
    writer: FigureWriter, test: Features, gallery: Features, query: int, rows: np.ndarray, names: list[str]
) -> tuple[np.ndarray, list[str]]:
    """The images of a query and of its nearest rows, and the names of their classes."""
    images = np.concatenate([writer.images(test, np.array([query])), writer.images(gallery, rows)])
    return images, [names[label] for label in (test.labels[query], *gallery.labels[rows])]
