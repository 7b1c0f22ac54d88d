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
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

WIDTH = 256  # elements that a short row is widened to: vector registers stay full, and sums stay in the cache
PIECE = 1 << 17  # elements

# Sums may be reordered, which is what vectorises them. NaN and infinity keep their meaning: a run that diverges shows.
_compile = partial(njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@_compile()
def _moments_rows(first, last, step, x, shift, sums):
    """sums[piece] = sums of d = x - shift and of d^2."""
    for piece in range(first, last):
        sum_d, sum_dd = sums[piece, 0], sums[piece, 1]
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            row = x[r]
            for c in range(shift.shape[0]):
                d = np.float64(row[c]) - shift[c]
                sum_d[c] += d
                sum_dd[c] += d * d


@_compile()
def _moments_planes(first, last, step, x, shift, sums):
    for piece in range(first, last):
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            c, row, sum_d, sum_dd = r % shift.shape[0], x[r], 0.0, 0.0
            for i in range(x.shape[1]):
                d = np.float64(row[i]) - shift[c]
                sum_d += d
                sum_dd += d * d
            sums[piece, 0, c] += sum_d
            sums[piece, 1, c] += sum_dd


@_compile()
def _products_rows(first, last, step, x, g, shift, sums):
    """sums[piece] = sums of g and of g (x - shift)."""
    for piece in range(first, last):
        sum_g, sum_gd = sums[piece, 0], sums[piece, 1]
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            row, row_g = x[r], g[r]
            for c in range(shift.shape[0]):
                sum_g[c] += np.float64(row_g[c])
                sum_gd[c] += np.float64(row_g[c]) * (np.float64(row[c]) - shift[c])


@_compile()
def _products_planes(first, last, step, x, g, shift, sums):
    for piece in range(first, last):
        for r in range(piece * step, min((piece + 1) * step, x.shape[0])):
            c, row, row_g, sum_g, sum_gd = r % shift.shape[0], x[r], g[r], 0.0, 0.0
            for i in range(x.shape[1]):
                sum_g += np.float64(row_g[i])
                sum_gd += np.float64(row_g[i]) * (np.float64(row[i]) - shift[c])
            sums[piece, 0, c] += sum_g
            sums[piece, 1, c] += sum_gd


@_compile()
def _affine_rows(first, last, step, x, shift, scale, offset, out):
    """out = (x - shift) scale + offset."""
    for r in range(first * step, min(last * step, x.shape[0])):
        row, to = x[r], out[r]
        for c in range(shift.shape[0]):
            to[c] = (np.float64(row[c]) - shift[c]) * scale[c] + offset[c]


@_compile()
def _affine_planes(first, last, step, x, shift, scale, offset, out):
    for r in range(first * step, min(last * step, x.shape[0])):
        row, to, c = x[r], out[r], r % shift.shape[0]
        for i in range(x.shape[1]):
            to[i] = (np.float64(row[i]) - shift[c]) * scale[c] + offset[c]


@_compile()
def _affine2_rows(first, last, step, x, g, shift, scale, offset, scale_g, out):
    """out = g scale_g + (x - shift) scale + offset."""
    for r in range(first * step, min(last * step, x.shape[0])):
        row, row_g, to = x[r], g[r], out[r]
        for c in range(shift.shape[0]):
            to[c] = np.float64(row_g[c]) * scale_g[c] + ((np.float64(row[c]) - shift[c]) * scale[c] + offset[c])


@_compile()
def _affine2_planes(first, last, step, x, g, shift, scale, offset, scale_g, out):
    for r in range(first * step, min(last * step, x.shape[0])):
        row, row_g, to, c = x[r], g[r], out[r], r % shift.shape[0]
        for i in range(x.shape[1]):
            to[i] = np.float64(row_g[i]) * scale_g[c] + ((np.float64(row[i]) - shift[c]) * scale[c] + offset[c])


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="moments")


class Elements:
    """The elements of x [N, C, ...] on the CPU, and of tensors of its shape. Vectors over channels are float64 [C].

    bfloat16 and float16 are computed with as float32, and results have x's own type.
    """

    def __init__(self, x: Tensor):
        self._shape, self._dtype, self._num_channels = x.shape, x.dtype, x.shape[1]
        self.count = x.numel() // self._num_channels  # per channel
        # Innermost channels are torch's channels_last in 4 and 5 dimensions, and every matrix.
        self._rows = x.movedim(1, -1).is_contiguous()
        self._repeats = math.gcd(self.count, max(1, WIDTH // self._num_channels)) if self._rows else 1
        self._x = self._matrix(x)
        self._step = max(1, PIECE // max(1, self._x.shape[1]))
        self._num_pieces = -(-len(self._x) // self._step)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the sum of squares about it, 0 where there are no elements."""
        if not self.count:
            return torch.zeros(2, self._num_channels, dtype=torch.float64).unbind()
        # Seen from any element of the channel nothing cancels: its distance from the mean is at most sqrt(count) std,
        # so that sums in float64 lose a factor `count` in the very worst case.
        if self._rows:
            first = self._x[0, : self._num_channels].astype(np.float64)
        else:
            first = self._x[: self._num_channels, 0].astype(np.float64)
        sum_d, sum_dd = self._sums(_moments_rows, _moments_planes, first)
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

    def _matrix(self, x: Tensor) -> np.ndarray:
        x = x.detach().to(torch.promote_types(self._dtype, torch.float32))
        if self._rows:
            return x.movedim(1, -1).reshape(-1, self._repeats * self._num_channels).contiguous().numpy()
        return x.reshape(math.prod(self._shape[:2]), math.prod(self._shape[2:])).contiguous().numpy()

    def _tensor(self, matrix: np.ndarray) -> Tensor:
        """In x's shape. Shaped by numpy: autograd lets no view that a Function returns be changed in place (ReLU)."""
        if self._rows:
            channels_last = matrix.reshape(self._shape[0], *self._shape[2:], self._num_channels)
            return torch.from_numpy(np.moveaxis(channels_last, -1, 1)).to(self._dtype)
        return torch.from_numpy(matrix.reshape(self._shape)).to(self._dtype)

    def _sums(self, by_rows: Callable, by_planes: Callable, shift: np.ndarray, *others: np.ndarray) -> np.ndarray:
        """Float64 [2, C]."""
        shift = np.tile(shift, self._repeats)
        sums = np.zeros((self._num_pieces, 2, len(shift)))
        self._over_pieces(by_rows if self._rows else by_planes, self._x, *others, shift, sums)
        return sums.sum(0).reshape(2, self._repeats, self._num_channels).sum(1)

    def _map(self, by_rows: Callable, by_planes: Callable, others: tuple, vectors: tuple[Tensor, ...]) -> Tensor:
        # numpy asks for huge pages: the first touch of a large result costs half of what torch.empty's does.
        out = np.empty_like(self._x)
        arrays = (np.tile(vector.numpy(), self._repeats) for vector in vectors)
        self._over_pieces(by_rows if self._rows else by_planes, self._x, *others, *arrays, out)
        return self._tensor(out)

    def _over_pieces(self, kernel: Callable, *arguments) -> None:
        """Run `kernel(first, last, step, *arguments)` over the pieces, on as many threads as torch uses."""
        num_threads = min(torch.get_num_threads(), self._num_pieces)
        if num_threads <= 1:
            kernel(0, self._num_pieces, self._step, *arguments)
            return
        bounds = [t * self._num_pieces // num_threads for t in range(num_threads + 1)]
        submit = _pool(torch.get_num_threads()).submit
        parts = [submit(kernel, *span, self._step, *arguments) for span in pairwise(bounds)]
        for part in parts:
            part.result()


def warm_up(dtype: torch.dtype) -> None:
    """Compile all loops for tensors of `dtype`: seconds the first time, then read from numba's cache."""
    for shape in ((2, 2), (2, 2, 2)):  # rows and planes
        x, vector = torch.zeros(shape, dtype=dtype), torch.zeros(2, dtype=torch.float64)
        elements = Elements(x)
        elements.moments()
        elements.products(x, vector)
        elements.affine(vector, vector, vector)
        elements.affine2(x, vector, vector, vector, vector)
