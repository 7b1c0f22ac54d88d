"""Pixels to network input on a CPU, by a table of what becomes of every level: one pass over memory, where torch's
operations make three, one of them with planes of pixels side by side."""

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from ssl_dist.kernels.compiled import run_parallel
from ssl_dist.numba_cache import njit


@njit(cache=True, nogil=True)  # no sums: none of njit_sums' liberties
def _look_up(first: int, last: int, pixels: ndarray, table: ndarray, out: ndarray) -> None:
    channels = table.shape[0]
    for n in range(first, last):
        for row in range(pixels.shape[2]):
            for column in range(pixels.shape[3]):
                for c in range(channels):
                    out[n, row, column, c] = table[c, pixels[n, c, row, column]]


@njit(cache=True, nogil=True)
def _look_up_planes(first: int, last: int, pixels: ndarray, table: ndarray, out: ndarray) -> None:
    for n in range(first, last):
        for c in range(table.shape[0]):
            values = table[c]
            for row in range(pixels.shape[2]):
                for column in range(pixels.shape[3]):
                    out[n, c, row, column] = values[pixels[n, c, row, column]]


def look_up(pixels: Tensor, table: Tensor, memory_format: torch.memory_format) -> Tensor:
    """pixels: uint8 or uint16 [N, C, H, W]; table: float32 or float64 [C, levels], the value of every level ->
    [N, C, H, W] in channels-last or contiguous order. Raises `ValueError` for another number of channels."""
    num, channels, height, width = pixels.shape
    if channels != len(table):  # the kernel would read and leave out what is not there
        raise ValueError(f"images of {channels} channels, and mean and std of {len(table)}")
    is_channels_last = memory_format is torch.channels_last
    if is_channels_last:
        kernel, out = _look_up, np.empty((num, height, width, channels), table.numpy().dtype)
    else:
        kernel, out = _look_up_planes, np.empty((num, channels, height, width), table.numpy().dtype)
    run_parallel(kernel, num, pixels.numpy(), table.numpy(), out)
    return torch.from_numpy(np.moveaxis(out, -1, 1) if is_channels_last else out)
