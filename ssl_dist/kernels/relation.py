"""The relation head on a CPU: forward and gradient in a few sweeps over the pairs, nothing of size pairs x hidden.

relation_cuda.py does the same on a GPU, by the equations that stand here.

Row k*M + m is view k of image m. A *couple* q is two views a < b with a shift s; its *unit* q*M + m is one positive
pair, (a, m) with (b, m), and one negative pair, (a, m) with (b, m - s mod M), whose target is 1 where the labels of its
two images are known and equal. The first layer of the head splits over
the members of a pair p = (i, j), h_p = A_i + B_j, with A and B computed once per row. In training the rest is

    x_p = (h_p - mu) r,  r = 1 / sqrt(var + eps)      BatchNorm over all P pairs of all ranks, per hidden unit
    y_p = g x_p + e                                   its weight and bias
    t_p = w . leaky_relu(y_p) + c                     the logit
    loss = 1/P sum_p focal(t_p, target_p)

Moments. With n_i the pairs whose left member is i (n_j: whose right member is j), and B'_i the sum of B_j over them,

    sum_p h_p = sum_i n_i A_i + sum_j n_j B_j,   sum_p h_p^2 = sum_i A_i (n_i A_i + 2 B'_i) + sum_j n_j B_j^2

The caller centres the rows (a shift is removed by the BatchNorm anyway), so that nothing cancels in E[h^2] - E[h]^2.

Gradient. Let d_p = dloss/dt_p and f_p = d_p leaky_relu'(y_p), without the factor w. The sweeps add up FA_i, the sum of
f_p over the pairs with left member i, YA_i, that of y_p, and FB_j, YB_j alike. As leaky_relu(y) = y leaky_relu'(y),

    F = sum_p f_p,  X = sum_p f_p x_p   give   de = w F,  dg = w X,  dw = g X + e F
    dA_i = r [ g (w FA_i - n_i de/P) - (YA_i - n_i e) dg/P ]         (g times the sum of i's x_p is YA_i - n_i e)

with de and dg summed over the ranks in the last line, and dB_j alike. Ranks sweep their shares of the units and
exchange two sums of 2 x hidden numbers. Threads take images: each row is owned by one thread and is added to in
one order, so the result does not depend on the number of threads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_dist.kernels import counting
from ssl_dist.kernels import relation_loops as loops
from ssl_dist.kernels.compiled import run_parallel

FLOPS_A_PAIR = 14  # additions, multiplications and comparisons of a pair and hidden unit in all sweeps


class Share(NamedTuple):
    """Units lo..hi-1 of the couples int64 [Q, 3] (view a, view b, shift), of `num_images` units each."""

    couples: np.ndarray
    num_images: int
    lo: int
    hi: int

    @property
    def num_pairs(self) -> int:
        """P, the pairs of all ranks."""
        return 2 * len(self.couples) * self.num_images

    def by_view(self, side: int) -> np.ndarray:
        """The couples that the share touches, those with the same left (side 0) or right (1) view together."""
        touched = np.arange(self.lo // self.num_images, -(-self.hi // self.num_images))
        return touched[np.argsort(self.couples[touched, side], kind="stable")]


class Head(NamedTuple):
    """What follows the first layer, and the loss. Vectors over hidden units are arrays of the type of A."""

    bn_weight: np.ndarray
    bn_bias: np.ndarray
    w: np.ndarray  # of the last layer
    c: float
    eps: float
    slope: float  # of the LeakyReLU
    gamma: float
    weights: tuple[float, float]  # of positives and of negatives


class Result(NamedTuple):
    loss: float  # the share's part of the mean over all pairs
    logits: np.ndarray  # [2, units of the share]: positives, negatives
    mean: np.ndarray  # of h, over the pairs of all ranks
    var: np.ndarray  # biased
    gradients: tuple[np.ndarray, ...]  # of A, B, bn_weight, bn_bias, w, c


def relation(A: np.ndarray, B: np.ndarray, head: Head, share: Share, labels: np.ndarray, reduce: Callable) -> Result:
    """All sweeps. `reduce` sums an array over the ranks. Vectors over hidden units are float64 in between."""
    M, P, dtype = share.num_images, share.num_pairs, A.dtype
    plan = (share.couples, M, share.lo, share.hi)
    count_a, count_b = np.zeros(len(A), dtype), np.zeros(len(A), dtype)
    loops.count(*plan, count_a, count_b)

    pair_b, sums = np.zeros_like(A), np.zeros((M, 2, A.shape[1]))
    run_parallel(loops.moments, M, *plan, A, B, count_a, count_b, pair_b, sums)
    mean, square = reduce(sums.sum(0)) / P
    with np.errstate(invalid="ignore"):  # inf - inf: the loss becomes NaN, and the training loop says so
        var = np.maximum(square - mean * mean, 0.0)
    g, e, w, r = *(v.astype(np.float64) for v in (head.bn_weight, head.bn_bias, head.w)), 1 / np.sqrt(var + head.eps)

    ya, yb = np.empty_like(A), np.empty_like(A)
    run_parallel(loops.normalize, M, M, A, B, (r * g).astype(dtype), (e - mean * r * g).astype(dtype), ya, yb)
    logits, d = np.empty((2, 2, share.hi - share.lo), dtype)
    fa, totals, slope = np.zeros_like(A), np.zeros((M, 2)), dtype.type(head.slope)
    last_layer = (head.w, dtype.type(head.c), slope, head.gamma, head.weights, labels)
    run_parallel(loops.sweep_left, M, *plan, ya, yb, *last_layer, logits, d, fa, totals)
    fb, pair_ya, sums = np.zeros_like(A), np.zeros_like(A), np.zeros_like(sums)
    run_parallel(loops.sweep_right, M, *plan, share.by_view(1), A, B, ya, yb, slope, d, fa, fb, pair_ya, sums)

    loss, dc = totals.sum(0)
    sum_f, sum_fh = sums.sum(0)
    sum_fx = r * (sum_fh - mean * sum_f)
    de, dg, dw = w * sum_f, w * sum_fx, g * sum_fx + e * sum_f
    mean_e, mean_g = reduce(np.stack([de, dg])) / P
    scale_f, scale_y, offset = r * g * w, r * mean_g, r * (g * mean_e - e * mean_g)
    for f, count, y, pair, scale_pair in (
        (fa, count_a, ya, pair_b, scale_y * r * g),  # YA_i = n_i ya_i + r g B'_i
        (fb, count_b, yb, pair_ya, scale_y),
    ):
        vectors = (v.astype(dtype) for v in (scale_f, scale_pair, scale_y, offset))
        run_parallel(loops.finish, M, M, f, count, y, pair, *vectors)
    return Result(loss, logits, mean, var, (fa, fb, *(np.asarray(v, dtype) for v in (dg, de, dw, dc))))


class _Relation(torch.autograd.Function):
    """The gradient is computed with the loss, so backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor, bn_weight: Tensor, bn_bias: Tensor, w: Tensor, c: Tensor,
        constants: tuple[float, float, float, tuple[float, float]], share: Share, labels: Tensor,
        reduce: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = Head(bn_weight.numpy(), bn_bias.numpy(), w.numpy(), c.item(), *constants)
        arrays = A.numpy(), B.numpy(), head, share, labels.numpy()
        result = relation(*arrays, lambda x: reduce(torch.from_numpy(x)).numpy())
        ctx.save_for_backward(*map(torch.from_numpy, result.gradients))
        others = tuple(map(torch.from_numpy, (result.logits, result.mean, result.var)))
        ctx.mark_non_differentiable(*others)
        return A.new_tensor(result.loss), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad_loss * grad for grad in ctx.saved_tensors), None, None, None, None


def relation_loss(
    A: Tensor,
    B: Tensor,
    bn1: nn.modules.batchnorm._BatchNorm,
    slope: float,
    linear2: nn.Linear,
    gamma: float,
    alpha: float | None,
    share: Share,
    labels: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The share's part of the mean focal loss over all pairs; its logits [2, units] (positives, negatives); mean and
    biased variance of h over all pairs, float64 [hidden].

    A, B [K*M, hidden], float32 or float64 on the CPU, centred over the rows and equal on all ranks: the first layer's
    values of a row as left and as right member. labels: int64 [M], -1 where unknown; equal and known ones make the
    negative pair of two images positive. `reduce` sums a tensor over the ranks, without gradient. Summed over the
    ranks, the parts and their gradients are those of one process. Only the first result has a gradient.
    """
    if A.is_meta:
        return _counted(A, B, (bn1.weight, bn1.bias, linear2.weight, linear2.bias), share, reduce)
    weights = (1.0, 1.0) if alpha is None else (alpha, 1.0 - alpha)
    constants = (bn1.eps, slope, gamma, weights)
    tensors = (A.contiguous(), B.contiguous(), bn1.weight, bn1.bias, linear2.weight[0], linear2.bias[0])
    return _Relation.apply(*tensors, constants, share, labels, reduce)


def _counted(
    A: Tensor, B: Tensor, parameters: tuple[Tensor, ...], share: Share, reduce: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `relation_loss` returns, of tensors without numbers; its work is noted."""
    mean, var = moments = A.new_empty((2, A.shape[1]), dtype=torch.float64)
    reduce(moments)
    reduce(moments)
    counting.note("relation", FLOPS_A_PAIR * 2 * (share.hi - share.lo) * A.shape[1])
    loss = sum((tensor.sum() for tensor in (A, B, *parameters)), A.new_empty(()))
    return loss, A.new_empty((2, share.hi - share.lo)), mean, var


def warm_up(dtype: torch.dtype) -> None:
    """Compile the sweeps for matrices of `dtype`: seconds the first time, then read from numba's cache."""
    rows = np.zeros((4, 1), torch.empty((), dtype=dtype).numpy().dtype)
    one = np.ones(1, rows.dtype)
    head = Head(one, one, one, 0.0, 1e-5, 0.01, 2.0, (1.0, 1.0))
    relation(rows, rows, head, Share(np.array([[0, 1, 1]]), 2, 0, 2), np.array([-1, -1]), lambda x: x)
