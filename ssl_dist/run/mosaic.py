"""The views of some images as one picture: a row for each image, a column for each view, group beside group."""

from collections.abc import Sequence

import numpy as np


def of_views(groups: Sequence[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """The picture, uint8 [height, width, 3], and where the middle of each column lies, in pixels from the left.

    groups: the views of each group, uint8 [V, B, 3, S, S], of the same B images. Views keep their size, so that a
    smaller group shows as smaller; the space between two groups is twice that between two views.
    """
    tallest = max(group.shape[3] for group in groups)
    gap = max(1, tallest // 16)
    columns, middles, left = [], [], 0
    for group in groups:
        _, num_images, _, height, width = group.shape
        top, extra = (tallest - height) // 2, gap if group is not groups[-1] else 0
        for number, views_BCHW in enumerate(group):
            space = gap + (extra if number == len(group) - 1 else 0)
            cells = np.full((num_images, tallest + gap, width + space, 3), 255, np.uint8)
            cells[:, top : top + height, :width] = views_BCHW.transpose(0, 2, 3, 1)
            columns.append(cells.reshape(num_images * (tallest + gap), width + space, 3))
            middles.append(left + width / 2 - 0.5)
            left += width + space
    return np.concatenate(columns, axis=1)[:-gap, :-gap], middles
