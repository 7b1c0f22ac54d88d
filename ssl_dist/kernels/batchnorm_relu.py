"""BatchNorm, ReLU and what stands around them on a CPU, in as few passes over memory as there can be.

    out = pool(relu((x - mean) scale + offset + added))

With the moments known, one sweep reads x and writes `out`. The backward pass needs the sign of what ReLU got: it is
computed again from x, or seen in `out` where something was added. Between x and `out`, which the next layer keeps
anyway, nothing is written or kept.

x is seen as rows of `kernels/moments.py`, channels innermost, where with pooling a row is a row of the image. Elements
are float64 in registers, and every sum runs over pieces of fixed length: the result does not depend on the number of
threads.
"""

import math

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from ssl_dist.kernels import counting
from ssl_dist.kernels.compiled import njit_sums, run_parallel
from ssl_dist.kernels.moments import PIECE_SIZE, ROW_LENGTH, Elements


@njit_sums()
def _relu(y: float) -> float:
    return np.float64(0.0) if y <= 0.0 else y  # NaN stays: a run that diverges shows


@njit_sums()
def _forward(
    first: int, last: int, step: int, x: ndarray, added: ndarray | None,
    shift: ndarray, scale: ndarray, offset: ndarray, out: ndarray,
) -> None:  # fmt: skip
    length = shift.shape[0]
    for r in range(first * step, min(last * step, x.shape[0])):
        for start in range(0, x.shape[1], length):
            row, to = x[r, start : start + length], out[r, start : start + length]
            if added is None:
                for i in range(length):
                    to[i] = _relu((np.float64(row[i]) - shift[i]) * scale[i] + offset[i])
            else:
                plus = added[r, start : start + length]
                for i in range(length):
                    to[i] = _relu((np.float64(row[i]) - shift[i]) * scale[i] + offset[i] + np.float64(plus[i]))


@njit_sums()
def _forward_pooled(
    first: int, last: int, step: int, x: ndarray, height: int, channels: int,
    shift: ndarray, scale: ndarray, offset: ndarray, out: ndarray,
) -> None:  # fmt: skip
    """The mean of every 2x2 pixels; an odd last row or column is in none."""
    length, rows = shift.shape[0], height // 2
    total = np.empty(x.shape[1])  # of two pixels, one above the other
    for r in range(first * step, min(last * step, out.shape[0])):
        upper = r // rows * height + r % rows * 2
        for start in range(0, x.shape[1], length):
            one, two = x[upper, start : start + length], x[upper + 1, start : start + length]
            to = total[start : start + length]
            for i in range(length):
                to[i] = _relu((np.float64(one[i]) - shift[i]) * scale[i] + offset[i])
            for i in range(length):  # not in one loop: two rows read in turn are not read ahead, which halves the speed
                to[i] += _relu((np.float64(two[i]) - shift[i]) * scale[i] + offset[i])
        mean = out[r]
        for p in range(mean.shape[0] // channels):
            for c in range(channels):
                mean[p * channels + c] = 0.25 * (total[2 * p * channels + c] + total[(2 * p + 1) * channels + c])


@njit_sums()
def _spread(grad: ndarray, r: int, height: int, channels: int, to: ndarray) -> None:
    """to = the gradient of row r of the image, where `grad` is that of the means of 2x2 pixels."""
    rows = height // 2
    if r % height >= 2 * rows:
        to[:] = 0.0
        return
    of_row = grad[r // height * rows + r % height // 2]
    pixels = of_row.shape[0] // channels
    to[2 * pixels * channels :] = 0.0
    for p in range(pixels):
        for c in range(channels):  # no parts of arrays here: to make them takes as long as 8 channels
            quarter = 0.25 * of_row[p * channels + c]
            to[2 * p * channels + c] = quarter
            to[(2 * p + 1) * channels + c] = quarter


@njit_sums()
def _products(
    first: int, last: int, step: int, x: ndarray, grad: ndarray, height: int, channels: int,
    shift: ndarray, scale: ndarray, offset: ndarray, sums: ndarray,
) -> None:  # fmt: skip
    """sums[piece] = sums of g and of g (x - shift), where g is the gradient that ReLU lets pass. height: 0 where
    nothing is pooled."""
    length, spread = shift.shape[0], np.empty(x.shape[1], x.dtype)
    for piece in range(first, last):
        sum_g, sum_gd = sums[piece, 0], sums[piece, 1]
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            if height:
                _spread(grad, r, height, channels, spread)
            for start in range(0, x.shape[1], length):
                row = x[r, start : start + length]
                row_g = spread[start : start + length] if height else grad[r, start : start + length]
                for i in range(length):
                    d = np.float64(row[i]) - shift[i]
                    g = np.float64(0.0) if d * scale[i] + offset[i] <= 0.0 else np.float64(row_g[i])
                    sum_g[i] += g
                    sum_gd[i] += g * d


@njit_sums()
def _gradient(
    first: int, last: int, step: int, x: ndarray, grad: ndarray, height: int, channels: int, shift: ndarray,
    scale: ndarray, offset: ndarray, scale_x: ndarray, offset_x: ndarray, out: ndarray,
) -> None:  # fmt: skip
    """out = g scale + (x - shift) scale_x + offset_x, g as in `_products`."""
    length, spread = shift.shape[0], np.empty(x.shape[1], x.dtype)
    for r in range(first * step, min(last * step, x.shape[0])):
        if height:
            _spread(grad, r, height, channels, spread)
        for start in range(0, x.shape[1], length):
            row, to = x[r, start : start + length], out[r, start : start + length]
            row_g = spread[start : start + length] if height else grad[r, start : start + length]
            for i in range(length):
                d = np.float64(row[i]) - shift[i]
                g = np.float64(0.0) if d * scale[i] + offset[i] <= 0.0 else np.float64(row_g[i])
                to[i] = g * scale[i] + (d * scale_x[i] + offset_x[i])


@njit_sums()
def _masked_products(
    first: int, last: int, step: int, x: ndarray, grad: ndarray, out: ndarray,
    shift: ndarray, masked: ndarray, sums: ndarray,
) -> None:  # fmt: skip
    """As `_products`, with g seen in what ReLU gave; masked = g, the gradient of what was added."""
    length = shift.shape[0]
    for piece in range(first, last):
        sum_g, sum_gd = sums[piece, 0], sums[piece, 1]
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            for start in range(0, x.shape[1], length):
                row, row_g = x[r, start : start + length], grad[r, start : start + length]
                y, to = out[r, start : start + length], masked[r, start : start + length]
                for i in range(length):
                    g = np.float64(0.0) if y[i] <= 0.0 else np.float64(row_g[i])
                    to[i] = g
                    sum_g[i] += g
                    sum_gd[i] += g * (np.float64(row[i]) - shift[i])


class Sweeps:
    """Over x [N, C, H, W] that `take` allows, on the CPU. Vectors over channels are float64 [C].

    pooled: `out` is [N, C, H // 2, W // 2], the mean of every 2x2 pixels. mean, scale, offset: of the map that ReLU
    follows.
    """

    def __init__(self, x: Tensor, pooled: bool, mean: Tensor, scale: Tensor, offset: Tensor):
        self._shape, self._dtype = x.shape, x.dtype
        num, self._channels, height, width = x.shape
        self._height = height if pooled else 0
        most = max(1, ROW_LENGTH // self._channels)
        if pooled:
            self._repeats = max(part for part in range(1, width + 1) if width % part == 0 and part <= most)
            self._length = width * self._channels
        else:
            self._repeats = math.gcd(num * height * width, most)
            self._length = self._repeats * self._channels
        self._x = self._matrix(x)
        self._step = max(1, PIECE_SIZE // self._length)
        self._tensor_x, self._mean, self._scale = x, mean, scale
        self._map = tuple(self._tiled(vector) for vector in (mean, scale, offset))

    @classmethod
    def take(cls, x: Tensor, pooled: bool) -> bool:
        """Whether there are sweeps for x [N, C, H, W]: numbers of 32 or 64 bits, channels innermost, pixels to pool."""
        if x.dim() != 4 or x.dtype not in (torch.float32, torch.float64) or not x.numel():
            return False
        return cls._in_rows(x) and (not pooled or min(x.shape[2:]) >= 2)

    @staticmethod
    def _in_rows(x: Tensor) -> bool:
        return x.movedim(1, -1).is_contiguous()

    def forward(self, added: Tensor | None) -> Tensor:
        """pool(relu((x - mean) scale + offset + added)). added: of x's shape, where nothing is pooled."""
        num, channels, height, width = self._shape
        if self._height:
            pooled = np.empty((num * (height // 2), width // 2 * channels), self._x.dtype)
            shape = (self._x, self._height, channels)
            run_parallel(_forward_pooled, self._pieces(pooled), self._step, *shape, *self._map, pooled)
            return self._tensor(pooled, height // 2, width // 2)
        out = np.empty_like(self._x)
        others = None if added is None else self._matrix(added)
        run_parallel(_forward, self._pieces(out), self._step, self._x, others, *self._map, out)
        return self._tensor(out, height, width)

    def products(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of g and of g (x - mean), where g is the gradient that ReLU lets pass of `grad`, that of `out`."""
        sums = self._sums()
        arrays = self._x, self._matrix(grad), self._height, self._channels, *self._map
        run_parallel(_products, len(sums), self._step, *arrays, sums)
        return self._of_channels(sums)

    def masked_products(self, grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `products` gives where something was added, and g."""
        sums, masked = self._sums(), np.empty_like(self._x)
        arrays = self._x, self._matrix(grad), self._matrix(out), self._map[0], masked
        run_parallel(_masked_products, len(sums), self._step, *arrays, sums)
        return *self._of_channels(sums), self._tensor(masked, *self._shape[2:])

    def gradient(self, grad: Tensor, scale_x: Tensor, offset_x: Tensor) -> Tensor:
        """g scale + (x - mean) scale_x + offset_x."""
        out = np.empty_like(self._x)
        arrays = self._x, self._matrix(grad), self._height, self._channels, *self._map
        of_x = self._tiled(scale_x), self._tiled(offset_x)
        run_parallel(_gradient, self._pieces(out), self._step, *arrays, *of_x, out)
        return self._tensor(out, *self._shape[2:])

    def gradient_of_masked(self, masked: Tensor, scale_x: Tensor, offset_x: Tensor) -> Tensor:
        """What `gradient` gives, of what `masked_products` gave."""
        return Elements(self._tensor_x).affine2(masked, self._mean, scale_x, offset_x, self._scale)

    def _pieces(self, rows: ndarray) -> int:
        return -(-len(rows) // self._step)

    def _matrix(self, x: Tensor) -> ndarray:
        """In rows; those of means are as wide as the image is then."""
        channels_last = x.detach().movedim(1, -1).contiguous()
        length = channels_last.shape[2] * self._channels if self._height else self._length
        return channels_last.view(-1, length).numpy()

    def _tensor(self, matrix: ndarray, height: int, width: int) -> Tensor:
        """Shaped by numpy: autograd lets no view that a Function returns be changed in place."""
        images = matrix.reshape(self._shape[0], height, width, self._channels)
        return torch.from_numpy(np.moveaxis(images, -1, 1))

    def _tiled(self, vector: Tensor) -> ndarray:
        return np.tile(vector.numpy(), self._repeats)

    def _sums(self) -> ndarray:
        return np.zeros((self._pieces(self._x), 2, self._repeats * self._channels))

    def _of_channels(self, sums: ndarray) -> tuple[Tensor, Tensor]:
        of_g, of_gd = sums.sum(0).reshape(2, self._repeats, self._channels).sum(1)
        return torch.from_numpy(of_g), torch.from_numpy(of_gd)


class CountedSweeps(Sweeps):
    """Of tensors without numbers: what every sweep returns, and to `counting` the bytes that it reads and writes."""

    def __init__(self, x: Tensor, pooled: bool, mean: Tensor, scale: Tensor, offset: Tensor):
        self._tensor_x, self._pooled, self._mean = x, pooled, mean

    @staticmethod
    def _in_rows(x: Tensor) -> bool:
        return True  # in a training; convolutions of meta tensors forget the order in memory

    def forward(self, added: Tensor | None) -> Tensor:
        x = self._tensor_x
        sides = [side // 2 if self._pooled else side for side in x.shape[2:]]
        out = x.new_empty(*x.shape[:2], *sides)
        _note(x, x, added, out)  # x for the moments, too
        return out

    def products(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        _note(self._tensor_x, grad)
        return torch.empty_like(self._mean), torch.empty_like(self._mean)

    def masked_products(self, grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        masked = torch.empty_like(grad)
        _note(out, masked)
        return *self.products(grad), masked

    def gradient(self, grad: Tensor, scale_x: Tensor, offset_x: Tensor) -> Tensor:
        grad_x = torch.empty_like(self._tensor_x)
        _note(self._tensor_x, grad, grad_x)
        return grad_x

    def gradient_of_masked(self, masked: Tensor, scale_x: Tensor, offset_x: Tensor) -> Tensor:
        return self.gradient(masked, scale_x, offset_x)


def _note(*tensors: Tensor | None) -> None:
    counting.note("batchnorm_relu", 0.0, sum(t.numel() * t.element_size() for t in tensors if t is not None))
