"""BatchNorm on a CPU: sums and affine maps of float32 or float64 elements per channel, in float64 in between.

Torch's own kernels add float32 elements one after the other where channels lie innermost: for 2048x8x32x32 the
variance is 1e-3 off, and so is whatever should not depend on the split of a batch over ranks. Here an element
becomes float64 in a register, which costs little beside reading it, and what is written is rounded once.

A tensor is seen as a matrix in one of two ways. *Rows*: channels lie innermost, and a row holds one or more elements of
every channel, in turn. *Planes*: a row holds elements of one channel, row r of channel r mod C.

Every sum runs over pieces of fixed length, whose sums are added in order: the result does not depend on the number of
threads.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from ssl_dist.kernels.compiled import njit_sums, run_parallel

ROW_LENGTH = 256  # elements that a short row is widened to: vector registers stay full, and sums stay in the cache
# Of sums of x alone, which are as fast as memory: several rows go into a sum before it is stored, and the reads of
# these rows lie so close together that the processor still reads ahead.
SUMMED_ROW_LENGTH, SUMMED_AT_ONCE = 32, 8
PIECE_SIZE = 1 << 17  # elements


@njit_sums()
def _moments_rows(first: int, last: int, step: int, x: ndarray, shift: ndarray, sums: ndarray) -> None:
    """sums[piece] = sums of d = x - shift and of d^2."""
    for piece in range(first, last):
        sum_d, sum_dd = sums[piece, 0], sums[piece, 1]
        start, stop = piece * step, min((piece + 1) * step, x.shape[0])
        single = stop - (stop - start) % SUMMED_AT_ONCE
        for r in range(start, single, SUMMED_AT_ONCE):
            for c in range(shift.shape[0]):
                own_d, own_dd = sum_d[c], sum_dd[c]
                for k in range(SUMMED_AT_ONCE):
                    d = np.float64(x[r + k, c]) - shift[c]
                    own_d += d
                    own_dd += d * d
                sum_d[c], sum_dd[c] = own_d, own_dd
        for r in range(single, stop):
            for c in range(shift.shape[0]):
                d = np.float64(x[r, c]) - shift[c]
                sum_d[c] += d
                sum_dd[c] += d * d


@njit_sums()
def _moments_planes(first: int, last: int, step: int, x: ndarray, shift: ndarray, sums: ndarray) -> None:
    for piece in range(first, last):
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            c, row, sum_d, sum_dd = r % shift.shape[0], x[r], 0.0, 0.0
            for i in range(x.shape[1]):
                d = np.float64(row[i]) - shift[c]
                sum_d += d
                sum_dd += d * d
            sums[piece, 0, c] += sum_d
            sums[piece, 1, c] += sum_dd


@njit_sums()
def _products_rows(first: int, last: int, step: int, x: ndarray, g: ndarray, shift: ndarray, sums: ndarray) -> None:
    """sums[piece] = sums of g and of g (x - shift)."""
    for piece in range(first, last):
        sum_g, sum_gd = sums[piece, 0], sums[piece, 1]
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            row, row_g = x[r], g[r]
            for c in range(shift.shape[0]):
                sum_g[c] += np.float64(row_g[c])
                sum_gd[c] += np.float64(row_g[c]) * (np.float64(row[c]) - shift[c])


@njit_sums()
def _products_planes(first: int, last: int, step: int, x: ndarray, g: ndarray, shift: ndarray, sums: ndarray) -> None:
    for piece in range(first, last):
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            c, row, row_g, sum_g, sum_gd = r % shift.shape[0], x[r], g[r], 0.0, 0.0
            for i in range(x.shape[1]):
                sum_g += np.float64(row_g[i])
                sum_gd += np.float64(row_g[i]) * (np.float64(row[i]) - shift[c])
            sums[piece, 0, c] += sum_g
            sums[piece, 1, c] += sum_gd


@njit_sums()
def _affine_rows(
    first: int, last: int, step: int, x: ndarray,
    shift: ndarray, scale: ndarray, offset: ndarray, out: ndarray,
) -> None:  # fmt: skip
    """out = (x - shift) scale + offset."""
    for r in range(first * step, min(last * step, x.shape[0])):
        row, to = x[r], out[r]
        for c in range(shift.shape[0]):
            to[c] = (np.float64(row[c]) - shift[c]) * scale[c] + offset[c]


@njit_sums()
def _affine_planes(
    first: int, last: int, step: int, x: ndarray,
    shift: ndarray, scale: ndarray, offset: ndarray, out: ndarray,
) -> None:  # fmt: skip
    for r in range(first * step, min(last * step, x.shape[0])):
        row, to, c = x[r], out[r], r % shift.shape[0]
        for i in range(x.shape[1]):
            to[i] = (np.float64(row[i]) - shift[c]) * scale[c] + offset[c]


@njit_sums()
def _affine2_rows(
    first: int, last: int, step: int, x: ndarray, g: ndarray,
    shift: ndarray, scale: ndarray, offset: ndarray, scale_g: ndarray, out: ndarray,
) -> None:  # fmt: skip
    """out = g scale_g + (x - shift) scale + offset."""
    for r in range(first * step, min(last * step, x.shape[0])):
        row, row_g, to = x[r], g[r], out[r]
        for c in range(shift.shape[0]):
            to[c] = np.float64(row_g[c]) * scale_g[c] + ((np.float64(row[c]) - shift[c]) * scale[c] + offset[c])


@njit_sums()
def _affine2_planes(
    first: int, last: int, step: int, x: ndarray, g: ndarray,
    shift: ndarray, scale: ndarray, offset: ndarray, scale_g: ndarray, out: ndarray,
) -> None:  # fmt: skip
    for r in range(first * step, min(last * step, x.shape[0])):
        row, row_g, to, c = x[r], g[r], out[r], r % shift.shape[0]
        for i in range(x.shape[1]):
            to[i] = np.float64(row_g[i]) * scale_g[c] + ((np.float64(row[i]) - shift[c]) * scale[c] + offset[c])


class Elements:
    """The elements of x [N, C, ...] on the CPU, and of tensors of its shape. Vectors over channels are float64 [C].

    bfloat16 and float16 are computed with as float32, and results have x's own type.
    """

    def __init__(self, x: Tensor):
        self._shape, self._dtype, self._num_channels = x.shape, x.dtype, x.shape[1]
        self.count = x.numel() // self._num_channels  # per channel
        # Innermost channels are torch's channels_last in 4 and 5 dimensions, and every matrix.
        self._rows = x.movedim(1, -1).is_contiguous()
        self._repeats = math.gcd(self.count, max(1, ROW_LENGTH // self._num_channels)) if self._rows else 1
        self._x = self._matrix(x)
        self._step = max(1, PIECE_SIZE // max(1, self._x.shape[1]))
        self._num_pieces = -(-len(self._x) // self._step)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the sum of squares about it, 0 where there are no elements."""
        if not self.count:
            zeros = torch.zeros(self._num_channels, dtype=torch.float64)
            return zeros, zeros.clone()
        # Seen from any element of the channel nothing cancels: its distance from the mean is at most sqrt(count) std,
        # so that sums in float64 lose a factor `count` in the very worst case.
        if self._rows:
            first = self._x[0, : self._num_channels].astype(np.float64)
        else:
            first = self._x[: self._num_channels, 0].astype(np.float64)
        repeats = math.gcd(self._repeats, max(1, SUMMED_ROW_LENGTH // self._num_channels))
        sum_d, sum_dd = self._sums(_moments_rows, _moments_planes, first, repeats=repeats)
        with np.errstate(invalid="ignore"):  # inf - inf: the loss becomes NaN, and the training loop says so
            mean, squares = first + sum_d / self.count, np.maximum(sum_dd - sum_d * sum_d / self.count, 0.0)
        return torch.from_numpy(mean), torch.from_numpy(squares)

    def products(self, grad: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of grad and of grad (x - mean)."""
        sums = self._sums(_products_rows, _products_planes, mean.numpy(), self._matrix(grad))
        return torch.from_numpy(sums[0]), torch.from_numpy(sums[1])

    def affine(self, mean: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """(x - mean) scale + offset."""
        return self._map(_affine_rows, _affine_planes, (), (mean, scale, offset))

    def affine2(self, grad: Tensor, mean: Tensor, scale: Tensor, offset: Tensor, scale_grad: Tensor) -> Tensor:
        """grad scale_grad + (x - mean) scale + offset."""
        return self._map(_affine2_rows, _affine2_planes, (self._matrix(grad),), (mean, scale, offset, scale_grad))

    def _matrix(self, x: Tensor) -> ndarray:
        x = x.detach().to(torch.promote_types(self._dtype, torch.float32))
        if self._rows:
            return x.movedim(1, -1).reshape(-1, self._repeats * self._num_channels).contiguous().numpy()
        return x.reshape(math.prod(self._shape[:2]), math.prod(self._shape[2:])).contiguous().numpy()

    def _tensor(self, matrix: ndarray) -> Tensor:
        """In x's shape. Shaped by numpy: autograd lets no view that a Function returns be changed in place (ReLU)."""
        if self._rows:
            channels_last = matrix.reshape(self._shape[0], *self._shape[2:], self._num_channels)
            return torch.from_numpy(np.moveaxis(channels_last, -1, 1)).to(self._dtype)
        return torch.from_numpy(matrix.reshape(self._shape)).to(self._dtype)

    def _sums(
        self, by_rows: Callable, by_planes: Callable, shift: ndarray, *others: ndarray, repeats: int | None = None
    ) -> ndarray:
        """Float64 [2, C]. repeats: elements of a channel in a row, a divisor of those there are; None: all of them."""
        parts = self._repeats // (repeats or self._repeats)  # of a row, each a row by itself
        arrays = (array.reshape(len(array) * parts, array.shape[1] // parts) for array in (self._x, *others))
        shift = np.tile(shift, self._repeats // parts)
        sums = np.zeros((self._num_pieces, 2, len(shift)))
        run_parallel(by_rows if self._rows else by_planes, self._num_pieces, self._step * parts, *arrays, shift, sums)
        return sums.sum(0).reshape(2, len(shift) // self._num_channels, self._num_channels).sum(1)

    def _map(
        self, by_rows: Callable, by_planes: Callable, others: tuple[ndarray, ...], vectors: tuple[Tensor, ...]
    ) -> Tensor:
        # numpy asks for huge pages: the first touch of a large result costs half of what torch.empty's does.
        out = np.empty_like(self._x)
        arrays = (np.tile(vector.numpy(), self._repeats) for vector in vectors)
        run_parallel(by_rows if self._rows else by_planes, self._num_pieces, self._step, self._x, *others, *arrays, out)
        return self._tensor(out)


def warm_up(dtype: torch.dtype) -> None:
    """Compile all loops for tensors of `dtype`: seconds the first time, then read from numba's cache."""
    for shape in ((2, 2), (2, 2, 2)):  # rows and planes
        x, vector = torch.zeros(shape, dtype=dtype), torch.zeros(2, dtype=torch.float64)
        elements = Elements(x)
        elements.moments()
        elements.products(x, vector)
        elements.affine(vector, vector, vector)
        elements.affine2(x, vector, vector, vector, vector)
