"""Steps that move or erase the pixels of one view, uint8 [3, S, S], in place.

The affine step equals torchvision's on a Pillow image bit for bit: the middle of each result pixel is taken back to
the source in float64, and the four pixels around it are weighted there and truncated (libImaging/Geometry.c).
"""

import math

import numpy as np

from ssl_dist.numba_cache import njit
from ssl_dist.views.draw import AffineParameters
from ssl_dist.views.resample import Box


@njit(cache=True, nogil=True)
def _copy(view: np.ndarray, source: np.ndarray) -> np.ndarray:
    """view uint8 [3, S, S] -> source uint8 [3 S S]; an assignment of slices would take a second more to compile."""
    levels = view.reshape(view.size)
    for i in range(levels.shape[0]):
        source[i] = levels[i]
    return source.reshape(view.shape)


@njit(cache=True, nogil=True)
def turn(view: np.ndarray, quarters: int, source: np.ndarray) -> None:
    """Turned counter-clockwise by `quarters` (1, 2 or 3) right angles. source: uint8 [3 S S], room for a copy."""
    size = view.shape[1]
    before = _copy(view, source)
    for c in range(3):
        for y in range(size):
            for x in range(size):
                row = x if quarters == 1 else size - 1 - (y if quarters == 2 else x)
                column = y if quarters == 3 else size - 1 - (x if quarters == 2 else y)
                view[c, y, x] = before[c, row, column]


@njit(cache=True, inline="always")
def inverse(affine: AffineParameters, size: int) -> tuple[float, float, float, float, float, float]:
    """What takes a place (x, y) of the result back to the source: xx, xy, x_shift and yx, yy, y_shift."""
    angle, right, down, scale, shear = affine
    middle = size * 0.5
    turned, tangent = math.radians(angle), math.tan(math.radians(shear))
    xx = (-math.sin(turned) * tangent + math.cos(turned)) / scale
    xy = -(-math.cos(turned) * tangent - math.sin(turned)) / scale
    yx, yy = -math.sin(turned) / scale, math.cos(turned) / scale
    x_shift = xx * (-middle - right) + xy * (-middle - down) + middle
    y_shift = yx * (-middle - right) + yy * (-middle - down) + middle
    return xx, xy, x_shift, yx, yy, y_shift


@njit(cache=True, nogil=True)
def move(view: np.ndarray, affine: AffineParameters, source: np.ndarray) -> None:
    """The affine step (degrees clockwise, right, down, scale, shear in degrees) about the middle; black outside."""
    size = view.shape[1]
    xx, xy, x_shift, yx, yy, y_shift = inverse(affine, size)
    before = _copy(view, source)
    for y in range(size):
        for x in range(size):
            x_in = xx * (x + 0.5) + xy * (y + 0.5) + x_shift
            y_in = yx * (x + 0.5) + yy * (y + 0.5) + y_shift
            if x_in < 0 or x_in >= size or y_in < 0 or y_in >= size:
                for c in range(3):
                    view[c, y, x] = 0
                continue
            x_in, y_in = x_in - 0.5, y_in - 0.5
            left, top = math.floor(x_in), math.floor(y_in)
            x_part, y_part = x_in - left, y_in - top
            near, far = max(left, 0), min(left + 1, size - 1)
            upper, lower = max(top, 0), min(top + 1, size - 1)
            for c in range(3):
                above, below = np.float64(before[c, upper, near]), np.float64(before[c, lower, near])
                above += (np.float64(before[c, upper, far]) - above) * x_part
                below += (np.float64(before[c, lower, far]) - below) * x_part
                view[c, y, x] = np.uint8(int(above + (below - above) * y_part))


@njit(cache=True, nogil=True)
def erase(view: np.ndarray, rectangle: Box, red: float, green: float, blue: float) -> None:
    """The rectangle (top, left, height, width) becomes one colour, levels from 0 to 255."""
    top, left, height, width = rectangle
    for y in range(top, top + height):
        for x in range(left, left + width):
            view[0, y, x] = red
            view[1, y, x] = green
            view[2, y, x] = blue
