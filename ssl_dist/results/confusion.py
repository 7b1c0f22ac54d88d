"""What a classifier takes for what: the pictures that kNN, logistic regression and retrieval have in common."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 2000  # a matrix of more would be no picture
_NAMED = 3  # confusions that the caption names


def class_names(*parts: Features) -> list[str]:
    """A name for every label that the parts have: the file's, or the number where the file has none."""
    count = max(int(part.labels.max()) + 1 for part in parts)
    known = parts[0].classes
    return known + [str(label) for label in range(len(known), count)]


def matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Images by true and predicted class, int64 [C, C], from labels and predictions int64 [N] in [0, C)."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def add_pictures(
    album: FigureWriter, test: Features, names: list[str], predicted: np.ndarray, name: str, how: str
) -> None:
    """Those of `pictures` of predictions int64 [N] for the images of `test`."""
    if len(names) > MOST_CLASSES:  # before the matrix is made, too
        return
    what = f"{len(test):,} images of {test.metadata['dataset']} {test.metadata['split']}"
    for picture in pictures(matrix(test.labels, predicted, len(names)), names, name, how, what):
        album.add(*picture)


def pictures(
    counts: np.ndarray, names: list[str], name: str, how: str, what: str
) -> Iterator[tuple[str, "Figure", str, str]]:
    """Name, figure, title and caption of <name>-confusion and <name>-classes; none where there are too many classes.

    counts: int64 [C, C], see `matrix`; `how` says in words what predicted, `what` which images.
    """
    from ssl_dist.results import charts  # matplotlib takes a second

    if len(names) > MOST_CLASSES:
        return
    totals = counts.sum(1)
    share = np.where(totals[:, None] > 0, counts * 100 / np.maximum(1, totals)[:, None], np.nan)
    accuracy = float(np.trace(counts) * 100 / totals.sum())
    blank = "; cells below 0.5 are blank" if len(names) <= charts.MOST_NUMBERS else ""
    yield (
        f"{name}-confusion",
        charts.confusion(share, names),
        f"Confusions of {how}",
        f"{what}: the share of each class's images (rows) that {how} takes for each class (columns), in"
        f" percent{blank}. {accuracy:.2f} % of all images are right. {_worst(counts, share, names)}",
    )
    yield (
        f"{name}-classes",
        charts.class_bars(share.diagonal(), names, accuracy, f"% right ({how})"),
        f"Classes by accuracy of {how}",
        f"{what}: percent of each class's images that {how} gives their own class, the best class first; the dashed"
        " line is the accuracy over all images.",
    )


def _worst(counts: np.ndarray, share: np.ndarray, names: list[str]) -> str:
    """The most frequent confusions in words."""
    wrong = np.nan_to_num(share.copy())
    np.fill_diagonal(wrong, 0)
    places = np.argsort(-wrong, axis=None, kind="stable")[:_NAMED]
    pairs = [divmod(int(place), len(names)) for place in places]
    said = [f"{names[a]} taken for {names[b]} ({share[a, b]:.0f} %)" for a, b in pairs if counts[a, b] and a != b]
    return f"Most frequent: {', '.join(said)}." if said else "No image is taken for another class."
