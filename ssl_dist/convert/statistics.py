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
    """Sum and sum of squares of each channel of pixels, uint8 or uint16 [H, W, C]: int64 [2, C], exact."""
    sums = np.zeros((2, pixels.shape[2]), np.int64)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            for channel in range(pixels.shape[2]):
                value = np.int64(pixels[y, x, channel])
                sums[0, channel] += value
                sums[1, channel] += value * value
    return sums


def measure(beton: Beton, threads: int) -> Moments:
    """Moments of pixels in [0, 1], six decimals, nine of 16 bits, of up to `MAX_IMAGES` images, evenly spaced, each
    with the same weight whatever its size. A channel that is constant gets `CONSTANT_STD`, which no other can have (at
    most 0.5). Independent of `threads`."""
    count, highest = min(beton.count, MAX_IMAGES), float((1 << beton.pixels.bits) - 1)
    channels, decimals = range(beton.pixels.channels), 6 if beton.pixels.bits == 8 else 9

    def moments(i: int) -> np.ndarray:
        pixels = stored_image(beton, i * beton.count // count)
        return _sums(pixels) / (pixels.shape[0] * pixels.shape[1])

    with ThreadPoolExecutor(threads) as pool:
        mean_powers = np.stack(list(pool.map(moments, range(count)))) / [[[highest], [highest**2]]]
    first, second = ([math.fsum(mean_powers[:, order, channel]) / count for channel in channels] for order in range(2))
    std = [math.sqrt(max(0.0, square - mean * mean)) for mean, square in zip(first, second, strict=True)]
    return [round(mean, decimals) for mean in first], [round(value, decimals) or CONSTANT_STD for value in std], count


def constant_channels(std: Sequence[float]) -> str:
    """The channels that `measure` found constant, in words; empty: none."""
    names = ("red", "green", "blue") if len(std) == 3 else tuple(f"channel {number}" for number in range(len(std)))
    return " and ".join(name for name, value in zip(names, std, strict=True) if value == CONSTANT_STD)
