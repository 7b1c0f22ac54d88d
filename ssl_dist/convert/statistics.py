"""Mean and standard deviation of a data set's pixels."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ssl_dist.data.arrays import stored_image
from ssl_dist.data.beton import Beton
from ssl_dist.data.manifest import CONSTANT_STD
from ssl_dist.numba_cache import njit

MAX_IMAGES = 20_000  # that are measured
Moments = tuple[Sequence[float], Sequence[float], int]  # mean and standard deviation per channel, images measured


@njit(cache=True, nogil=True)
def _sums(pixels: np.ndarray) -> np.ndarray:
    """Sum and sum of squares of each channel of pixels, uint8 [H, W, 3]: int64 [2, 3], exact."""
    sums = np.zeros((2, 3), np.int64)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            for channel in range(3):
                value = np.int64(pixels[y, x, channel])
                sums[0, channel] += value
                sums[1, channel] += value * value
    return sums


def measure(beton: Beton, threads: int) -> Moments:
    """Moments of pixels in [0, 1], six decimals, of up to `MAX_IMAGES` images, evenly spaced, each with the same weight
    whatever its size. A channel that is constant gets `CONSTANT_STD`, which no other can have (at most 0.5).
    Independent of `threads`."""
    count = min(beton.count, MAX_IMAGES)

    def moments(i: int) -> np.ndarray:
        pixels = stored_image(beton, i * beton.count // count)
        return _sums(pixels) / (pixels.shape[0] * pixels.shape[1])

    with ThreadPoolExecutor(threads) as pool:
        mean_powers = np.stack(list(pool.map(moments, range(count)))) / [[[255.0], [255.0**2]]]
    first, second = ([math.fsum(mean_powers[:, order, channel]) / count for channel in range(3)] for order in range(2))
    std = [math.sqrt(max(0.0, square - mean * mean)) for mean, square in zip(first, second, strict=True)]
    return [round(mean, 6) for mean in first], [round(value, 6) or CONSTANT_STD for value in std], count


def constant_channels(std: Sequence[float]) -> str:
    """The channels that `measure` found constant, in words; empty: none."""
    names = ("red", "green", "blue")
    return " and ".join(name for name, value in zip(names, std, strict=True) if value == CONSTANT_STD)
