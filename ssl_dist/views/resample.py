"""Antialiased bilinear and bicubic resampling of 8-bit RGB images, bit for bit as Pillow does it.

Pillow resamples rows, rounds to 8 bits, resamples columns and rounds again, with a triangle or a cubic filter whose
weights are integers of 22 fractional bits (libImaging/Resample.c). Here each axis is planned once and both passes are
loops over integers; a flip of the result and a crop out of it cost nothing, they only change the plan. (Pillow 13 takes
the columns first when the height shrinks by more than twice as many pixels as the width; those results may differ from
these by a level or two, and bicubic ones by more at hard edges, where the filter overshoots and the first pass clips.)
"""

import math
from typing import NamedTuple

import numpy as np

from ssl_dist.numba_cache import njit
from ssl_dist.views.vectors import BITS, PACKED, PIXELS, ROWS, SPAN, filter_column, filter_span, interleave

U = np.uint64  # unsigned indices spare the test for negative ones

Bool = bool | np.bool_
Pair = tuple[int, int]  # down, right: a height and a width, or a top and a left
Box = tuple[int, int, int, int]  # top, left, height, width
AxisPlan = tuple[np.ndarray, np.ndarray]  # first source pixel uint64 [S]; weights uint64 [S, taps], flat


class Buffers(NamedTuple):
    """Buffers of one thread, reused for every image it resizes to S x S pixels out of at most Hmax x Wmax."""

    filter: np.ndarray  # float64 [max taps], the filter at one result pixel
    x_plan: AxisPlan
    y_plan: AxisPlan
    packed: np.ndarray  # uint8 [Wmax + max taps, 16], flat: the columns of a block of four rows
    rows: np.ndarray  # uint8 [Hmax + max taps, P], flat: the result of the horizontal pass, S pixels in a row
    line: np.ndarray  # uint8 [P], P > 3 S: a row of the result of both passes


@njit(cache=True, inline="always")
def new_buffers(max_height: int, max_width: int, kept: Pair, shortest: int, bicubic: bool) -> Buffers:
    """Buffers for a resize to sides of `shortest` pixels or more, of which `kept` (height, width) are kept.

    The spare pixels after a row and rows after an image are read with weight 0 only.
    """
    height, width = kept
    taps = math.ceil((4 if bicubic else 2) * max(max_height / shortest, max_width / shortest, 1.0))
    pitch = 3 * width // SPAN * SPAN + SPAN
    return Buffers(
        np.empty(taps),
        (np.empty(width, np.uint64), np.empty(width * taps, np.uint64)),
        (np.empty(height, np.uint64), np.empty(height * taps, np.uint64)),
        np.empty((max_width + taps) * PACKED, np.uint8),
        np.empty((max_height + taps + ROWS) * pitch, np.uint8),
        np.empty(pitch, np.uint8),
    )


@njit(cache=True, inline="always")
def _cubic(x: float) -> float:
    """Pillow's bicubic filter (a = -1/2) at the distance x >= 0; 0 from 2 on."""
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2 else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def plan_axis(
    in_len: int, resized_len: int, offset: int, mirror: Bool, bicubic: Bool, filter: np.ndarray, plan: AxisPlan
) -> int:
    """Plan of an axis: resize `in_len` pixels to `resized_len`, of which S from `offset` on are kept.

    Fills plan: start [S], the first source pixel of each result pixel, and weights [S, T], both mirrored left-right
    where `mirror`. Returns T, the number of source pixels that every result pixel reads; those beyond `in_len`
    have weight 0, as have all of a result pixel outside 0 .. resized_len - 1.
    """
    start, weights = plan
    size = start.shape[0]
    scale = in_len / resized_len
    stretch = max(scale, 1.0)
    support = stretch * (2.0 if bicubic else 1.0)
    inverse = 1.0 / stretch
    taps = math.ceil(2 * support)
    for x in range(size):
        center = (x + offset + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        slot = size - 1 - x if mirror else x
        start[slot] = first
        total = 0.0
        for t in range(taps):
            distance = abs((first + t - center + 0.5) * inverse)
            value = _cubic(distance) if bicubic else max(1.0 - distance, 0.0)
            filter[t] = value if first + t < in_len else 0.0
            total += filter[t]
        for t in range(taps):
            weight = filter[t] / total * (1 << BITS)
            weights[slot * taps + t] = int(weight + 0.5 if weight > 0 else weight - 0.5)
    if offset < 0 or offset + size > resized_len:
        for x in range(size):
            if x + offset < 0 or x + offset >= resized_len:
                slot = size - 1 - x if mirror else x
                start[slot] = 0 if x + offset < 0 else in_len - 1
                for t in range(taps):
                    weights[slot * taps + t] = 0
    return taps


@njit(cache=True, nogil=True)
def resample_rows(
    image: np.ndarray, stride: int, origin: int, width: int, span: Pair, taps: int, buffers: Buffers
) -> None:
    """Horizontal pass over a span (first row, number of rows) of a crop, into the same rows of `buffers.rows`.

    image: uint8, flat, `stride` bytes a row; the crop begins at byte `origin` and is `width` pixels wide. Four rows are
    filtered side by side; where fewer are left, the last one takes the place of the others. Indices into flat arrays
    because slices in the loops would be counted references.
    """
    (start, weights), packed, rows = buffers.x_plan, buffers.packed, buffers.rows
    first_row, last_row, pitch = U(span[0]), U(span[0] + span[1] - 1), U(buffers.line.shape[0])
    for block in range(first_row, last_row + U(1), U(ROWS)):
        first = U(origin) + block * U(stride)
        second = U(origin) + min(block + U(1), last_row) * U(stride)
        third = U(origin) + min(block + U(2), last_row) * U(stride)
        fourth = U(origin) + min(block + U(3), last_row) * U(stride)
        # Whole vectors are read up to the end of the image, not beyond
        room = (image.shape[0] - int(fourth) - 4 * PIXELS) // 3 + PIXELS
        vectors = U(max(min(width, room), 0) // PIXELS * PIXELS)
        for x in range(U(0), vectors, U(PIXELS)):
            at = U(3) * x
            interleave(image, first + at, second + at, third + at, fourth + at, packed, U(PACKED) * x)
        for x in range(vectors, U(width)):
            for channel in range(U(3)):
                at, to = U(3) * x + channel, U(PACKED) * x + channel
                packed[to] = image[first + at]
                packed[to + U(4)] = image[second + at]
                packed[to + U(8)] = image[third + at]
                packed[to + U(12)] = image[fourth + at]
        to = block * pitch
        for x in range(U(start.shape[0])):
            filter_column(packed, start[x] * U(PACKED), weights, x * U(taps), U(taps), rows, to, pitch)
            to += U(3)


@njit(cache=True, nogil=True)
def resample_columns(buffers: Buffers, taps: int, out: np.ndarray) -> None:
    """Vertical pass: buffers.rows -> out uint8 [3, S, W], flat."""
    (start, weights), rows, line = buffers.y_plan, buffers.rows, buffers.line
    height, width, pitch = U(start.shape[0]), U(buffers.x_plan[0].shape[0]), U(line.shape[0])
    green, blue = height * width, U(2) * height * width
    for y in range(height):
        for x in range(U(0), U(3) * width, U(SPAN)):
            filter_span(rows, start[y] * pitch + x, pitch, weights, y * U(taps), U(taps), line, x)
        to = y * width
        for x in range(width):
            out[to + x] = line[U(3) * x]
            out[to + green + x] = line[U(3) * x + U(1)]
            out[to + blue + x] = line[U(3) * x + U(2)]


@njit(cache=True, inline="always")
def proportional(short_side: int, height: int, width: int) -> Pair:
    """Height and width with the short side resized to `short_side` and the long one in proportion, rounded down."""
    new_height = short_side if height <= width else int(short_side * height / width)
    new_width = short_side if width <= height else int(short_side * width / height)
    return new_height, new_width


@njit(cache=True, inline="always")
def resize_crop(
    image: np.ndarray,
    crop: Box,
    resized: Pair,
    corner: Pair,
    flip: Bool,
    bicubic: bool,
    buffers: Buffers,
    out: np.ndarray,
) -> None:
    """The crop (top, left, height, width) of image uint8 [H, W, 3] -> out uint8 [3, S, S], mirrored where `flip`.

    The crop is resized to `resized` (height, width), of which the S x S pixels from `corner` (top, left) on are kept;
    those outside are black.
    """
    top, left, height, width = crop
    upright = np.bool_(False)  # for the literal numba would compile plan_axis a second time
    x_taps = plan_axis(width, resized[1], corner[1], flip, bicubic, buffers.filter, buffers.x_plan)
    y_taps = plan_axis(height, resized[0], corner[0], upright, bicubic, buffers.filter, buffers.y_plan)
    first_row = int(buffers.y_plan[0][0])
    num_rows = min(int(buffers.y_plan[0][out.shape[1] - 1]) + y_taps, height) - first_row
    stride = 3 * image.shape[1]
    origin = top * stride + 3 * left
    flat = image.reshape(image.size)
    resample_rows(flat, stride, origin, width, (first_row, num_rows), x_taps, buffers)
    resample_columns(buffers, y_taps, out.reshape(out.size))


@njit(cache=True, nogil=True)
def resize_image(image: np.ndarray, height: int, width: int, resized: Pair, bicubic: bool) -> np.ndarray:
    """The first height x width pixels of image uint8 [H, W, 3] -> uint8 [3, resized height, resized width]."""
    buffers = new_buffers(height, width, resized, min(resized[0], resized[1]), bicubic)
    out = np.empty((3, resized[0], resized[1]), np.uint8)
    resize_crop(image, (0, 0, height, width), resized, (0, 0), np.bool_(False), bicubic, buffers, out)
    return out
