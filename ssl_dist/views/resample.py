"""Antialiased bilinear and bicubic resampling of 8-bit RGB images, bit for bit as Pillow does it.

Pillow resamples rows, rounds to 8 bits, resamples columns and rounds again, with a triangle or a cubic filter whose
weights are integers of 22 fractional bits (libImaging/Resample.c). Here each axis is planned once and both passes are
loops over integers; a flip of the result and a crop out of it cost nothing, they only change the plan. (Pillow 13 takes
the columns first when the height shrinks by more than twice as many pixels as the width; those results may differ from
these by a level or two, and bicubic ones by more at hard edges, where the filter overshoots and the first pass clips.)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite.ir import Constant, IntType
from numba import types
from numba.extending import intrinsic

from ssl_dist.numba_cache import njit

BITS = 22
HALF = 1 << (BITS - 1)
U, I = np.uint64, np.int32  # noqa: E741 - unsigned indices spare the test for negative ones


Bool = bool | np.bool_
Pair = tuple[int, int]  # down, right: a height and a width, or a top and a left
Box = tuple[int, int, int, int]  # top, left, height, width
AxisPlan = tuple[np.ndarray, np.ndarray]  # first source pixel uint64 [S]; weights uint64 [S, taps], flat


class Buffers(NamedTuple):
    """Buffers of one thread, reused for every image it resizes to S x S pixels out of at most Hmax x Wmax."""

    filter: np.ndarray  # float64 [max taps], the filter at one result pixel
    x_plan: AxisPlan
    y_plan: AxisPlan
    packed: np.ndarray  # uint64 [Wmax + max taps, 2], flat: a row of pixels as (red and green, blue)
    rows: np.ndarray  # uint8 [3, Hmax + max taps, S], flat: the result of the horizontal pass
    sums: np.ndarray  # int32 [S]


@njit(cache=True, inline="always")
def new_buffers(max_height: int, max_width: int, kept: Pair, shortest: int, bicubic: bool) -> Buffers:
    """Buffers for a resize to sides of `shortest` pixels or more, of which `kept` (height, width) are kept.

    The spare pixels after a row and rows after an image are read with weight 0 only.
    """
    height, width = kept
    taps = math.ceil((4 if bicubic else 2) * max(max_height / shortest, max_width / shortest, 1.0))
    return Buffers(
        np.empty(taps),
        (np.empty(width, np.uint64), np.empty(width * taps, np.uint64)),
        (np.empty(height, np.uint64), np.empty(height * taps, np.uint64)),
        np.empty((max_width + taps) * 2, np.uint64),
        np.empty(3 * (max_height + taps) * width, np.uint8),
        np.empty(width, np.int32),
    )


def _intrinsic(define: Callable[..., Any]) -> Any:
    """numba's `intrinsic`, by whose type a caller would pass the typing context, too."""
    return intrinsic(define)


@_intrinsic
def _multiply_add(typingctx: Any, total: Any, pixel: Any, weight: Any) -> Any:
    """total + pixel * weight in 32 bits; numba widens int32 arithmetic to 64 bits, which halves the speed of SIMD."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(arguments[0], builder.mul(arguments[1], arguments[2]))

    return types.int32(types.int32, types.int32, types.int32), generate


@_intrinsic
def _level(typingctx: Any, total: Any) -> Any:
    """The 8-bit level of a sum of weighted pixels, again in 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.trunc(builder.lshr(arguments[0], Constant(IntType(32), BITS)), IntType(8))

    return types.uint8(types.int32), generate


@_intrinsic
def _clipped_level(typingctx: Any, total: Any) -> Any:
    """The 8-bit level of a sum of weighted pixels that may be out of range, in 32 bits, too."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lowest, highest = (Constant(IntType(32), level) for level in (0, 255))
        level = builder.ashr(arguments[0], Constant(IntType(32), BITS))
        level = builder.select(builder.icmp_signed("<", level, lowest), lowest, level)
        level = builder.select(builder.icmp_signed(">", level, highest), highest, level)
        return builder.trunc(level, IntType(8))

    return types.uint8(types.int32), generate


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
    image: np.ndarray, stride: int, origin: int, width: int, span: Pair, taps: int, bicubic: bool, buffers: Buffers
) -> None:
    """Horizontal pass over a span (first row, number of rows) of a crop, into the same rows of `buffers.rows`.

    image: uint8, flat, `stride` bytes a row; the crop begins at byte `origin` and is `width` pixels wide. Two channels
    share one 64-bit product: 8-bit pixels times weights that add up to 2**22 stay below 2**32. The sums of a bicubic
    filter may be negative: then the low one has borrowed from the high one, and both need clipping. Indices into flat
    arrays because slices in the loops would be counted references.
    """
    (start, weights), packed, rows = buffers.x_plan, buffers.packed, buffers.rows
    first_row, num_rows = span
    size, plane = U(start.shape[0]), U(rows.shape[0] // 3)
    for r in range(U(first_row), U(first_row + num_rows)):
        byte = U(origin) + r * U(stride)
        for j in range(U(0), U(2 * width), U(2)):
            packed[j] = U(image[byte]) | U(image[byte + U(1)]) << U(32)
            packed[j + U(1)] = U(image[byte + U(2)])
            byte += U(3)
        red = r * size
        green, blue = red + plane, red + plane + plane
        if taps == 2:
            for x in range(size):
                j, near, far = U(2) * start[x], weights[U(2) * x], weights[U(2) * x + U(1)]
                rg = U(HALF | HALF << 32) + packed[j] * near + packed[j + U(2)] * far
                b = U(HALF) + packed[j + U(1)] * near + packed[j + U(3)] * far
                rows[red + x] = (rg >> U(BITS)) & U(255)
                rows[green + x] = rg >> U(BITS + 32)
                rows[blue + x] = b >> U(BITS)
        else:
            for x in range(size):
                j, rg, b = U(2) * start[x], U(HALF | HALF << 32), U(HALF)
                for k in range(x * U(taps), (x + U(1)) * U(taps)):
                    rg += packed[j] * weights[k]
                    b += packed[j + U(1)] * weights[k]
                    j += U(2)
                if bicubic:
                    low = I(rg)
                    rows[red + x] = _clipped_level(low)
                    rows[green + x] = _clipped_level(I((rg - U(np.int64(low))) >> U(32)))
                    rows[blue + x] = _clipped_level(I(b))
                else:
                    rows[red + x] = (rg >> U(BITS)) & U(255)
                    rows[green + x] = rg >> U(BITS + 32)
                    rows[blue + x] = b >> U(BITS)


@njit(cache=True, nogil=True)
def resample_columns(buffers: Buffers, taps: int, bicubic: bool, out: np.ndarray) -> None:
    """Vertical pass: buffers.rows uint8 [3, R, W], flat -> out uint8 [3, S, W], flat; W is the length of the sums."""
    (start, weights), rows, sums = buffers.y_plan, buffers.rows, buffers.sums
    size, width, plane = U(start.shape[0]), U(sums.shape[0]), U(rows.shape[0] // 3)
    for c in range(U(3)):
        for y in range(size):
            row = c * plane + start[y] * width
            to = (c * size + y) * width
            if taps == 2:
                near, far = I(weights[U(2) * y]), I(weights[U(2) * y + U(1)])
                for x in range(width):
                    total = _multiply_add(I(HALF), I(rows[row + x]), near)
                    out[to + x] = _level(_multiply_add(total, I(rows[row + width + x]), far))
            else:
                for x in range(width):
                    sums[x] = I(HALF)
                for t in range(U(taps)):
                    weight = I(weights[y * U(taps) + t])
                    for x in range(width):
                        sums[x] = _multiply_add(sums[x], I(rows[row + x]), weight)
                    row += width
                if bicubic:
                    for x in range(width):
                        out[to + x] = _clipped_level(sums[x])
                else:
                    for x in range(width):
                        out[to + x] = _level(sums[x])


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
    resample_rows(flat, stride, origin, width, (first_row, num_rows), x_taps, bicubic, buffers)
    resample_columns(buffers, y_taps, bicubic, out.reshape(out.size))


@njit(cache=True, nogil=True)
def resize_image(image: np.ndarray, height: int, width: int, resized: Pair, bicubic: bool) -> np.ndarray:
    """The first height x width pixels of image uint8 [H, W, 3] -> uint8 [3, resized height, resized width]."""
    buffers = new_buffers(height, width, resized, min(resized[0], resized[1]), bicubic)
    out = np.empty((3, resized[0], resized[1]), np.uint8)
    resize_crop(image, (0, 0, height, width), resized, (0, 0), np.bool_(False), bicubic, buffers, out)
    return out
