"""Gaussian blur of one view, uint8 [3, S, S], in place, as Pillow and as torchvision do it.

Pillow's GaussianBlur is three passes of an "extended" box filter along the rows and three along the columns, each
rounded to 8 bits (libImaging/BoxBlur.c after Gwosdek et al., SSVM 2011): equal bit for bit. torchvision's gaussian_blur
multiplies with a kernel of n x n weights in float32, the image mirrored at its edges, and rounds once. Here the rows
and the columns are filtered one after the other, in float32 and without rounding between, which rarely differs by one
level.
"""

import math
from typing import NamedTuple

import numpy as np

from ssl_dist.numba_cache import njit

PASSES = 3
F, U = np.float32, np.uint64  # unsigned indices spare the test for negative ones
FRACTION, ROUND = np.uint32(24), np.uint32(1 << 23)  # the weights of a box are integers of 24 fractional bits


class Buffers(NamedTuple):
    """Of one thread: what blurs of S x S pixels with boxes or kernels of up to 2 M + 1 pixels need."""

    first: np.ndarray  # uint8 [3, S, S], flat
    second: np.ndarray
    line: np.ndarray  # uint8 [S + 2 M + 2]
    sums: np.ndarray  # uint32 [S]
    weights: np.ndarray  # float32 [2 M + 1]
    smooth: np.ndarray  # float32 [S + 2 M]
    levels: np.ndarray  # float32 [S]


@njit(cache=True)
def new_buffers(size: int, max_sigma: float, kernel: int) -> Buffers:
    """Buffers for blurs with sigma up to `max_sigma` and kernels of `kernel` pixels (0: Pillow's blur)."""
    margin = kernel // 2 if kernel > 0 else int(_box_radius(max_sigma))
    return Buffers(
        np.empty(3 * size * size, np.uint8),
        np.empty(3 * size * size, np.uint8),
        np.empty(size + 2 * margin + 2, np.uint8),
        np.empty(size, np.uint32),
        np.empty(2 * margin + 1, np.float32),
        np.empty(size + 2 * margin, np.float32),
        np.empty(size, np.float32),
    )


# ------------------------------------------------------------------------------------------------- Pillow's


@njit(cache=True)
def _box_radius(sigma: float) -> np.float32:
    """The radius (float32) of the box whose `PASSES` passes have the variance sigma**2."""
    variance = F(F(sigma) * F(sigma) / F(PASSES))
    length = F(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = F(math.floor((np.float64(length) - 1.0) / 2.0))
    next_ = F(whole + F(1))
    part = F(F(F(2) * whole + F(1)) * F(F(whole * next_) - F(F(3) * variance)))
    return F(whole + F(part / F(F(6) * F(variance - F(next_ * next_)))))


@njit(cache=True, inline="always")
def _box_level(total: np.uint32, far: np.uint32, inner: np.uint32, outer: np.uint32) -> np.uint8:
    """inner * total + outer * far as an 8-bit level; all is below 2**32."""
    return np.uint8(np.uint32(total * inner + far * outer + ROUND) >> FRACTION)


@njit(cache=True, nogil=True)
def _box_rows(
    view: np.ndarray, size: int, radius: int, inner: np.uint32, outer: np.uint32, line: np.ndarray, sums: np.ndarray
) -> None:
    """One pass along the rows of view uint8 [3, S, S], flat, in place. Beyond the edges their pixels are repeated."""
    side, margin = U(size), U(radius + 1)
    for row in range(U(0), U(view.shape[0]), side):
        for x in range(margin):
            line[x] = view[row]
            line[margin + side + x] = view[row + side - U(1)]
        for x in range(side):
            line[margin + x] = view[row + x]
        for x in range(side):
            sums[x] = line[x + U(1)]
        for shift in range(U(2), margin + margin):
            for x in range(side):
                sums[x] += line[x + shift]
        for x in range(side):
            far = np.uint32(line[x]) + np.uint32(line[x + margin + margin])
            view[row + x] = _box_level(sums[x], far, inner, outer)


@njit(cache=True, nogil=True)
def _box_columns(
    view: np.ndarray, size: int, radius: int, inner: np.uint32, outer: np.uint32, sums: np.ndarray, out: np.ndarray
) -> None:
    """One pass along the columns of view uint8 [3, S, S], flat -> out, as view. The edges are as in `_box_rows`."""
    for first in range(0, view.shape[0], size * size):
        for y in range(size):
            for x in range(U(size)):
                sums[x] = 0
            for near in range(y - radius, y + radius + 1):
                row = U(first + min(max(near, 0), size - 1) * size)
                for x in range(U(size)):
                    sums[x] += view[row + x]
            above = U(first + max(y - radius - 1, 0) * size)
            below = U(first + min(y + radius + 1, size - 1) * size)
            to = U(first + y * size)
            for x in range(U(size)):
                far = np.uint32(view[above + x]) + np.uint32(view[below + x])
                out[to + x] = _box_level(sums[x], far, inner, outer)


@njit(cache=True, nogil=True)
def blur_as_pillow(view: np.ndarray, sigma: float, buffers: Buffers) -> None:
    """GaussianBlur(sigma) of view uint8 [3, S, S], in place."""
    size, levels = view.shape[1], view.reshape(view.size)
    box = _box_radius(sigma)
    radius = int(box)
    inner = np.uint32(F(1 << 24) / F(F(box * F(2)) + F(1)))
    outer = np.uint32(np.uint32((1 << 24) - (2 * radius + 1) * np.int64(inner)) >> np.uint32(1))
    for _ in range(PASSES):
        _box_rows(levels, size, radius, inner, outer, buffers.line, buffers.sums)
    _box_columns(levels, size, radius, inner, outer, buffers.sums, buffers.first)
    _box_columns(buffers.first, size, radius, inner, outer, buffers.sums, buffers.second)
    _box_columns(buffers.second, size, radius, inner, outer, buffers.sums, levels)


# ------------------------------------------------------------------------------------------------- torchvision's


@njit(cache=True, inline="always")
def _mirrored(i: int, size: int) -> int:
    """The index i beyond the edges, reflected at the edge pixel; |i| < size beyond either edge."""
    i = abs(i)
    return i if i < size else 2 * size - 2 - i


@njit(cache=True, nogil=True)
def blur_as_torchvision(view: np.ndarray, sigma: float, kernel: int, buffers: Buffers) -> None:
    """gaussian_blur(view, [kernel, kernel], sigma) of view uint8 [3, S, S], or another number of channels and uint16,
    in place. kernel: odd, kernel // 2 < S."""
    size, half, levels = view.shape[1], kernel // 2, view.reshape(view.size)
    weights, smooth, sums, source = buffers.weights, buffers.smooth, buffers.levels, buffers.first
    total = F(0)
    for k in range(kernel):
        scaled = F(F(k - half) / F(sigma))
        weights[k] = F(math.exp(F(-0.5) * F(scaled * scaled)))
        total = F(total + weights[k])
    for k in range(kernel):
        weights[k] /= total
    for i in range(levels.shape[0]):
        source[i] = levels[i]
    for first in range(0, levels.shape[0], size * size):
        for y in range(size):
            for x in range(size):
                smooth[half + x] = 0
            for k in range(kernel):
                row, weight = U(first + _mirrored(y + k - half, size) * size), weights[k]
                for x in range(U(size)):
                    smooth[U(half) + x] += weight * F(source[row + x])
            for x in range(half):
                smooth[half - 1 - x] = smooth[half + 1 + x]
                smooth[half + size + x] = smooth[half + size - 2 - x]
            for x in range(U(size)):
                sums[x] = 0
            for k in range(U(kernel)):
                weight = weights[k]
                for x in range(U(size)):
                    sums[x] += weight * smooth[x + k]
            to = U(first + y * size)
            for x in range(U(size)):
                levels[to + x] = levels.dtype.type(np.rint(sums[x]))
