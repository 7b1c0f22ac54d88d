"""Confusion matrices and accuracies by class: the pictures that all classifiers have in common."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CLASSES = 2000  # a matrix of more would be no picture
_NUM_IN_CAPTION = 3  # the most frequent confusions


def class_names(*parts: Features) -> list[str]:
    """A name for every label that the parts have: the file's, or the number where the file has none."""
    return names_up_to(max(int(part.labels.max()) + 1 for part in parts), parts[0].classes)


def names_up_to(count: int, names: Sequence[str]) -> list[str]:
    """These names of classes, and numbers for those up to `count` that have no name."""
    return [*names, *map(str, range(len(names), count))]


def matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Images by true and predicted class, int64 [C, C], from labels and predictions int64 [N] in [0, C)."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def add_pictures(
    writer: FigureWriter, test: Features, names: list[str], predicted: np.ndarray, name: str, how: str
) -> None:
    """Write the `pictures` of predictions int64 [N] for the images of `test`, and the list of those that are wrong."""
    wrong = np.flatnonzero(predicted != test.labels)
    texts = [[names[label] for label in labels[wrong].tolist()] for labels in (test.labels, predicted)]
    rows = zip(test.image_ids[wrong].tolist(), writer.files(test, wrong), *texts, strict=True)
    listed = writer.add_table(f"{name}-errors", ("image_id", "file", "class", "predicted"), rows, test)
    if len(names) > MAX_CLASSES:  # before the matrix is made, too
        return
    what = f"{len(test):,} images of {test.metadata['dataset']} {test.metadata['split']}"
    for figure_name, figure, title, caption in pictures(
        matrix(test.labels, predicted, len(names)), names, name, how, what
    ):
        if figure_name.endswith("-confusion"):
            caption += f" All that are wrong: {listed}."
        writer.add(figure_name, figure, title, caption)


def pictures(
    counts: np.ndarray, names: list[str], name: str, how: str, what: str
) -> Iterator[tuple[str, "Figure", str, str]]:
    """Name, figure, title and caption of <name>-confusion and <name>-classes; none where there are too many classes.

    counts: int64 [C, C], see `matrix`; `how` says in words what predicted, `what` which images.
    """
    from ssl_dist.results import charts  # matplotlib takes a second

    if len(names) > MAX_CLASSES:
        return
    totals = counts.sum(1)
    share = np.where(totals[:, None] > 0, counts * 100 / np.maximum(1, totals)[:, None], np.nan)
    accuracy = float(np.trace(counts) * 100 / totals.sum())
    blank = "; cells below 0.5 are blank" if len(names) <= charts.MAX_LABELLED_CLASSES else ""
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
    cells = np.argsort(-wrong, axis=None, kind="stable")[:_NUM_IN_CAPTION]
    pairs = [divmod(int(cell), len(names)) for cell in cells]
    confusions = [f"{names[a]} taken for {names[b]} ({share[a, b]:.0f} %)" for a, b in pairs if counts[a, b] and a != b]
    return f"Most frequent: {', '.join(confusions)}." if confusions else "No image is taken for another class."
