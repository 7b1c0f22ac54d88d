"""Weighted k-nearest-neighbour classification (Wu et al., CVPR 2018; as in DINO and SFRIK; T is self-label's sigma).

Rows are L2-normalised; an image's k nearest training images by cosine vote for their class with weight exp(cos / T);
the class with the largest sum is predicted. Every test image counts once, whatever their number.

Ties have a fixed order: of equal cosines the lower image id is the nearer; of equal votes the lower class index comes
first, and so do, in the top-5, classes without any vote (where the official codes leave the order to an unstable sort).
Cosines are rounded, so in fp32 images closer together than about 1e-7 may change places with the memory budget; on a
GPU they have one order, that of the exact cosines (`kernels.neighbours`).
"""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field

from ssl_dist.config import PositiveInt, Section
from ssl_dist.device import CPU
from ssl_dist.kernels.neighbours import neighbours, votes
from ssl_dist.results.accuracy import neighbour_counts, target_rank
from ssl_dist.results.confusion import add_pictures, class_names
from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features, check_pair, require_labels

PROTOCOL = (
    "weighted kNN: L2-normalised features, cosine, votes exp(cos/T), number of neighbours and T (0.07 unless given) as"
    " named, all test images, {precision}"
)
VERSION = 1
DRAWS = True
_PUBLISHED_K = (20, 200)
_PUBLISHED_TEMPERATURE = 0.07

# Below 0.005 the weights exp(cos / T) would leave float64's range.
Temperature = Annotated[float, Field(ge=0.005, allow_inf_nan=False)]


def _each_once(temperatures: list[float]) -> list[float]:
    """In the order that was given: the pictures are of the first."""
    return list(dict.fromkeys(temperatures))


class Options(Section):
    k: Annotated[list[PositiveInt], Field(min_length=1)] | None = Field(
        None,
        description="list of neighbour counts; null: 20 and 200, without those above the number of training images",
    )
    temperature: Annotated[list[Temperature], Field(min_length=1), AfterValidator(_each_once)] = Field(
        [_PUBLISHED_TEMPERATURE], description="list of T in the votes exp(cos / T), each at least 0.005"
    )
    precision: Literal["fp32", "fp64"] = Field("fp32", description="of the cosines; votes are always summed in fp64")
    memory_mb: PositiveInt = Field(512, description="MiB for blocks of rows and cosines; less is slower")


def run(
    train: Features,
    test: Features,
    options: Options,
    writer: FigureWriter | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Percent correct: `knn<k>_top1` and `knn<k>_top5` for every k, `knn<k>_T<t>_top1` for a T other than 0.07.

    Top-5 counts the first min(5, k) classes, as the official codes do. Pictures are of the largest k and the first T.
    Raises `UserError` for files that do not belong together, missing labels, fewer than two classes and a k above the
    number of training images.
    """
    check_pair(train, test)
    require_labels(train, test)
    counts = neighbour_counts(options.k, _PUBLISHED_K, len(train), "knn.k", train.source)
    train_labels_N, test_labels_N = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    num_classes = max(len(train.classes), int(train.labels.max()) + 1, int(test.labels.max()) + 1)
    dtype = torch.float64 if options.precision == "fp64" else torch.float32
    num_correct: dict[str, int] = {}
    predicted_N = np.zeros(len(test), np.int64)
    memory = options.memory_mb << 20
    blocks = neighbours(train, test, max(counts), dtype, memory, num_classes, device or CPU)
    for start, cosine_QK, row_QK in blocks:
        labels_QK = train_labels_N[row_QK]
        targets_Q = test_labels_N[start : start + len(row_QK)]
        for k in counts:
            for temperature in options.temperature:
                votes_QC = votes(cosine_QK[:, :k], labels_QK[:, :k], temperature, num_classes)
                rank_Q = target_rank(votes_QC, targets_Q)
                for top, limit in ((1, 1), (5, min(5, k))):
                    name = _name(k, temperature, top)
                    num_correct[name] = num_correct.get(name, 0) + int((rank_Q < limit).sum())
                if writer is not None and (k, temperature) == (counts[-1], options.temperature[0]):
                    predicted_N[start : start + len(row_QK)] = votes_QC.numpy().argmax(1)  # of equals the first
    if writer is not None:
        add_pictures(writer, test, class_names(test, train), predicted_N, "knn", f"kNN with {counts[-1]} neighbours")
    return {name: number * 100.0 / len(test) for name, number in num_correct.items()}


def _name(k: int, temperature: float, top: int) -> str:
    if temperature == _PUBLISHED_TEMPERATURE:
        return f"knn{k}_top{top}"
    short = f"{temperature:g}"  # of six digits; two temperatures must not have one name
    return f"knn{k}_T{short if float(short) == temperature else temperature}_top{top}"
