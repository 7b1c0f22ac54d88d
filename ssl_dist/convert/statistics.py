"""Mean and standard deviation of a data set's pixels."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from ssl_dist.data.arrays import stored_image
from ssl_dist.data.beton import Beton

MOST = 20_000  # images that are measured


@njit(cache=True, nogil=True)
def _sums(pixels):
    """Sum and sum of squares of each channel of pixels, uint8 [H, W, 3]: int64 [2, 3], exact."""
    sums = np.zeros((2, 3), np.int64)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            for channel in range(3):
                value = np.int64(pixels[y, x, channel])
                sums[0, channel] += value
                sums[1, channel] += value * value
    return sums


def measure(beton: Beton, threads: int) -> tuple[list[float], list[float], int]:
    """Per channel mean and standard deviation of pixels in [0, 1], six decimals, and the number of images measured:
    up to `MOST`, evenly spaced. Every image counts the same, whatever its size. Independent of `threads`."""
    number = min(beton.count, MOST)

    def moments(i: int) -> np.ndarray:
        pixels = stored_image(beton, i * beton.count // number)
        return _sums(pixels) / (pixels.shape[0] * pixels.shape[1])

    with ThreadPoolExecutor(threads) as pool:
        found = np.stack(list(pool.map(moments, range(number)))) / [[[255.0], [255.0**2]]]
    first, second = ([math.fsum(found[:, order, channel]) / number for channel in range(3)] for order in range(2))
    std = [math.sqrt(max(0.0, square - mean * mean)) for mean, square in zip(first, second, strict=True)]
    return [round(mean, 6) for mean in first], [round(value, 6) for value in std], number
