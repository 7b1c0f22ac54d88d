"""Predictions drawn on test images: boxes, and masks beside the true ones."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from ssl_dist.voc.data import CLASSES, VOID, Objects

MAX_IMAGES = 12  # of a picture
MIN_SCORE = 0.5  # of a box that is drawn
COLUMNS = 4
TRUE_COLOUR, FOUND_COLOUR = "#2ca02c", "#ff7f0e"

BOXES_CAPTION = (
    f"Test images, evenly spaced over the split. Dashed: the true boxes, difficult ones dotted. Solid: what was found "
    f"with a score of at least {MIN_SCORE:g}, which stands beside the class."
)
MASKS_CAPTION = (
    "Test images, evenly spaced over the split: the image, the true mask (white: void, which does not count) and the "
    "one that was found, in VOC's colours."
)


def boxes(shown: Sequence[tuple[Image.Image, Objects, np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """For every image the true objects, and the boxes, labels and scores predicted."""
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for number, (image, objects, detected, labels, scores) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.imshow(image)
        axes.set_axis_off()
        for box, hard in zip(objects.boxes, objects.difficult, strict=True):
            axes.add_patch(_rectangle(box, TRUE_COLOUR, ":" if hard else "--"))
        for box, label, score in zip(detected, labels, scores, strict=True):
            if score < MIN_SCORE:
                continue
            axes.add_patch(_rectangle(box, FOUND_COLOUR, "-"))
            axes.text(
                box[0], box[1], f"{CLASSES[label]} {score:.2f}", size=7, color="black", va="bottom", clip_on=True,
                bbox={"facecolor": FOUND_COLOUR, "edgecolor": "none", "pad": 1, "alpha": 0.8},
            )  # fmt: skip
    return figure


def _rectangle(box: np.ndarray, colour: str, style: str) -> Rectangle:
    x0, y0, x1, y1 = (float(corner) for corner in box)
    return Rectangle(
        (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style, linewidth=1.5
    )


def palette() -> np.ndarray:
    """uint8 [256, 3]: VOC's colours. Bits 0, 3, 6 of an index are the high bits of red, 1, 4, 7 green, 2, 5 blue."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            colours[index, bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    colours[VOID] = 255
    return colours


def masks(shown: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]], names: Sequence[str]) -> Figure:
    """For every image its true mask and the one found, class indices [H, W]; two images a row."""
    rows, colours = -(-len(shown) // 2), palette()
    figure = Figure(figsize=(12, 1.7 * rows + 0.5), layout="constrained")
    for number, (image, true, predicted) in enumerate(shown):
        for column, picture in enumerate((image, colours[true], colours[predicted])):
            axes = figure.add_subplot(rows, 6, 3 * number + column + 1)
            axes.imshow(picture)
            axes.set_axis_off()
            if number < 2:
                axes.set_title(("image", "true", "found")[column], size=9)
    present = sorted({int(c) for _, true, predicted in shown for c in np.union1d(true, predicted)} - {VOID})
    handles = [Patch(facecolor=colours[c] / 255, label=names[c]) for c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 11), frameon=False, fontsize=8)
    return figure
