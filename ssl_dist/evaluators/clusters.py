"""Agreement of clusters with the classes: clusters of k-means on the features, or labels that a method gave its images.

k-means is fitted on training images (at most `limit`, drawn by key) and every image of both splits goes to the nearest
centre, of equal ones to the first; a GPU finds the same clusters, in the numerics of `kernels.kmeans`. Labels of a file
(`ssl-dist labels` writes one) are of training images, so what is measured of them is named `clusters_train_...`; images
that the file does not list are left out. A file has no name of its split: one with an id that the split lacks is of
another one, and refused. Labels of a split without classes, as STL-10's `unlabeled`, are looked at by --split.

Measured: normalised and adjusted mutual information and the adjusted Rand index, scikit-learn's, 1 at the most; and two
accuracies in percent, both with the labels of the split that is measured, as papers have it. By majority vote a cluster
is of the class that most of its images have (the clusters' purity, which many small clusters make large); by Hungarian
matching (Kuhn, 1955) each cluster stands for one class at the most and each class for one cluster.

Of a split alone k-means is fitted on its own images. Without classes what is left are the number of clusters that have
images and the share of the largest, the pictures, and the list of every image's cluster.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_dist.config import NonNegativeInt, PositiveInt, Section
from ssl_dist.data import labels as labels_file
from ssl_dist.device import CPU
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError, refuse_unreadable
from ssl_dist.kernels.kmeans import kmeans
from ssl_dist.keys import EVALUATION, ORDER, hash64, permutation
from ssl_dist.results import cluster_figures
from ssl_dist.results.cluster_figures import Clusters
from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features, check_pair, have_classes

_NUMBER_WITHOUT_CLASSES = 10
VERSION = 1
DRAWS = True


class Options(Section):
    number: PositiveInt | None = Field(None, description="of clusters; null: as many as classes, 10 without any")
    normalize: bool = Field(True, description="features to length 1 before k-means, as kNN and retrieval take them")
    starts: PositiveInt = Field(5, description="k-means begins anew so often; the smallest sum of distances is kept")
    iterations: PositiveInt = Field(100, description="of each start, at the most")
    limit: PositiveInt = Field(50_000, description="training images that k-means is fitted on, drawn by key")
    labels: str | None = Field(None, description="CSV file of labels of training images, in the place of k-means")
    column: NonNegativeInt = Field(0, description="which of the file's label columns")
    page: NonNegativeInt = Field(
        12, description="images of every cluster on the page of all clusters, figures/...-clusters.html; 0: no page"
    )
    seed: NonNegativeInt = Field(0, description="of the drawn images, the starts and the pictures")
    memory_mb: PositiveInt = Field(1024, description="MiB for features; those that k-means is fitted on must fit")


def protocol(options: Options) -> str:
    """The sentence that says how was measured. A file of labels is named with the start of its SHA-256."""
    scores = "NMI, AMI and ARI as scikit-learn's; majority vote and Hungarian matching with the labels of the split"
    return f"{_clusters_in_words(options, 'as many clusters as classes', 'training images')}: {scores}"


def protocol_without_labels(options: Options) -> str:
    """The sentence for a split that has no classes."""
    how = _clusters_in_words(options, f"{_NUMBER_WITHOUT_CLASSES} clusters", "of its images")
    return f"{how}: clusters that have images, and the share of the largest in percent"


def _clusters_in_words(options: Options, usual_number: str, images: str) -> str:
    """What makes the clusters, or the file that has them."""
    if options.labels is not None:
        with refuse_unreadable(f"clusters.labels = {options.labels!r}"):
            digest = hashlib.sha256(Path(options.labels).read_bytes()).hexdigest()[:12]
        return f"labels of training images, column {options.column} of {options.labels} ({digest})"
    number = usual_number if options.number is None else f"{options.number} clusters"
    rows = "L2-normalised features" if options.normalize else "features as they are"
    return (
        f"k-means, {number}, {rows}, fitted on at most {options.limit} {images}, best of {options.starts} starts"
        f" with seed {options.seed}"
    )


def run(
    train: Features,
    test: Features,
    options: Options,
    writer: FigureWriter | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`clusters_nmi`, `_ami`, `_ari` and, in percent, `_majority_top1` and `_hungarian_top1` of the test split, and
    `clusters_train_...` of the training split; of labels of a file only those, and of a split alone only the former.
    Of a split alone that has no classes `clusters_count` and, in percent of its images, `clusters_largest`.

    Raises `UserError` for files that do not belong together, missing labels, fewer than two classes, fewer images than
    clusters, images that do not fit `memory_mb`, and a damaged file of labels.
    """
    check_pair(train, test)
    with_classes = have_classes(train, test)
    if options.labels is not None:
        keys = "clusters.labels", "clusters.column"
        clusters_N = labels_file.read(options.labels, options.column, train.num_in_split, keys)[train.image_ids]
        rows = np.flatnonzero(clusters_N >= 0)
        if len(rows) == 0:
            raise UserError(f"clusters.labels = {options.labels!r}: lists no image of {train.source}")
        highest = clusters_N.max()
        if highest >= len(train):  # the table of clusters and classes would be as long
            raise UserError(
                f"clusters.labels = {options.labels!r}: has label {highest} for {len(train)} images; number them from 0"
            )
        if writer is not None:
            how = f"column {options.column} of {options.labels}"
            _draw(writer, train, rows, clusters_N[rows], how, options, with_classes)
        if not with_classes:
            return _sizes(clusters_N[rows])
        return _named("clusters_train_", scores(train.labels[rows], clusters_N[rows]))
    number = options.number
    if number is None:
        number = len(np.unique(train.labels)) if with_classes else min(_NUMBER_WITHOUT_CLASSES, len(train))
    centres_KD = _fitted(train, number, options, device or CPU)
    test_N = _assigned(test, centres_KD, options)
    if writer is not None:
        how = f"k-means with {len(centres_KD)} clusters on {'these' if train is test else 'training'} images"
        _draw(writer, test, np.arange(len(test)), test_N, how, options, with_classes)
    if not with_classes:
        return _sizes(test_N)
    values = _named("clusters_", scores(test.labels, test_N))
    if train is test:
        return values
    train_N = _assigned(train, centres_KD, options)
    return values | _named("clusters_train_", scores(train.labels, train_N))


def scores(labels_N: np.ndarray, clusters_N: np.ndarray) -> dict[str, float]:
    """Agreement of two labelings int64 [N], numbers from 0: nmi, ami, ari, and two accuracies in percent."""
    from scipy.optimize import linear_sum_assignment  # these take a second
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

    counts_KC = contingency(labels_N, clusters_N)
    matched = counts_KC[linear_sum_assignment(counts_KC, maximize=True)]
    return {
        "nmi": float(normalized_mutual_info_score(labels_N, clusters_N)),
        "ami": float(adjusted_mutual_info_score(labels_N, clusters_N)),
        "ari": float(adjusted_rand_score(labels_N, clusters_N)),
        "majority_top1": float(counts_KC.max(1).sum() * 100 / len(labels_N)),
        "hungarian_top1": float(matched.sum() * 100 / len(labels_N)),
    }


def _sizes(clusters_N: np.ndarray) -> dict[str, float]:
    sizes_K = np.bincount(clusters_N)
    return {
        "clusters_count": float((sizes_K > 0).sum()),
        "clusters_largest": float(sizes_K.max() * 100 / len(clusters_N)),
    }


def _draw(
    writer: FigureWriter,
    part: Features,
    rows: np.ndarray,
    clusters_n: np.ndarray,
    how: str,
    options: Options,
    with_classes: bool,
) -> None:
    counts_KC = contingency(part.labels[rows], clusters_n) if with_classes else None
    cluster_figures.draw(writer, Clusters(part, rows, clusters_n, counts_KC, how), options.page, options.seed)


def contingency(labels_N: np.ndarray, clusters_N: np.ndarray) -> np.ndarray:
    """Images by cluster and class, int64 [K, C]."""
    num_clusters, num_classes = int(clusters_N.max()) + 1, int(labels_N.max()) + 1
    counts = np.bincount(clusters_N * num_classes + labels_N, minlength=num_clusters * num_classes)
    return counts.reshape(num_clusters, num_classes)


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


# -------------------------------------------------------------------------------------------------- k-means


def _fitted(train: Features, number: int, options: Options, device: torch.device = CPU) -> Tensor:
    """Centres float64 [K, D] of `number` clusters on the device; one that stayed empty has none."""
    count = min(len(train), options.limit)
    if count < number:
        raise UserError(
            f"clusters.number = {number}: k-means is fitted on {count} images only; give clusters.number up to {count}"
        )
    needed = -(-count * train.dim * 8 * 5 // 4 // 2**20)
    if needed > options.memory_mb:
        raise UserError(
            f"clusters.memory_mb = {options.memory_mb}: {count} images of {train.dim} features need {needed} MiB;"
            f" raise it, or lower clusters.limit = {options.limit}"
        )
    rows = np.sort(permutation(hash64(options.seed, EVALUATION, ORDER), len(train))[:count])
    x_ND = torch.empty(count, train.dim, dtype=torch.float64, device=device)
    step = _rows_in(train, number, options)
    for start in range(0, count, step):
        x_ND[start : start + step] = _prepared(train.take(rows[start : start + step]), options, device)
    key = hash64(options.seed, EVALUATION)
    world, positions = one_process(device), torch.arange(count, device=device)
    cluster_N, _ = kmeans(x_ND, positions, count, number, key, world, options.starts, options.iterations)
    sums_KD = x_ND.new_zeros(number, train.dim).index_add_(0, cluster_N, x_ND)
    sizes_K = torch.bincount(cluster_N, minlength=number)
    return sums_KD[sizes_K > 0] / sizes_K[sizes_K > 0, None]


def _assigned(part: Features, centres_KD: Tensor, options: Options) -> np.ndarray:
    """The nearest centre of every row, int64 [N]."""
    cluster_N, step = np.empty(len(part), np.int64), _rows_in(part, len(centres_KD), options)
    for start in range(0, len(part), step):
        x_RD = _prepared(part.rows(start, min(start + step, len(part))), options, centres_KD.device)
        distance_RK = torch.addmm(centres_KD.square().sum(1), x_RD, centres_KD.T, alpha=-2)
        cluster_N[start : start + step] = distance_RK.argmin(1).cpu().numpy()
    return cluster_N


def _prepared(rows: np.ndarray, options: Options, device: torch.device) -> Tensor:
    x_RD = torch.from_numpy(rows).to(device).double()
    return F.normalize(x_RD) if options.normalize else x_RD


def _rows_in(part: Features, num_centres: int, options: Options) -> int:
    return max(1, (options.memory_mb << 20) // 10 // (part.dim * 24 + num_centres * 8))
