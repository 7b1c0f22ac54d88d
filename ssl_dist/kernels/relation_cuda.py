"""The relation head on a GPU: the sweeps of relation.py in Triton, forward and gradient together as on the CPU.

Nothing of size pairs x hidden is written: the memory is that of five matrices like A and of four numbers a unit. The
host asks the device for nothing. Sums over rows are taken in float64, and all in one order: the same input gives the
same bits.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_dist.device import to_device
from ssl_dist.kernels.relation import Share

WARP_BYTES = 1024  # of a row that a warp has: 8 float32 a thread
MAX_WARPS = 16
MIN_TILE = 32  # hidden units
OLDEST_GPU = (7, 0)  # the first compute capability that Triton compiles for


def obstacle() -> str:
    """What the kernels lack on this machine, in words; empty where nothing is lacking. Triton compiles a part of every
    kernel's call in C."""
    return _obstacle(os.environ.get("CC"), os.environ.get("PATH"))


@lru_cache
def _obstacle(compiler: str | None, path: str | None) -> str:
    """compiler, path: of the environment, which a program may change."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (compiler or shutil.which("gcc", path=path) or shutil.which("clang", path=path)):
        return "Triton finds no C compiler"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Triton finds no Python.h"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_GPU:
        return "this GPU is too old for Triton"
    return ""


def memory(num_rows: int, num_units: int, hidden: int) -> int:
    """Bytes that a GPU holds at most for the share's units, in float32."""
    return 4 * (5 * num_rows * hidden + 4 * num_units)


def _couples_of_views(share: Share, num_views: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The share's couples by the view of a side (0 left, 1 right), rows (couple, view of the other side, shift); and
    where in them each view's begin, [num_views + 1]."""
    order = share.by_view(side)
    rows = np.stack([order, share.couples[order, 1 - side], share.couples[order, 2]], axis=1)
    return rows, np.searchsorted(share.couples[order, side], np.arange(num_views + 1))


def _tables(share: Share, num_views: int, device: torch.device) -> list[Tensor]:
    """Couples and begins by left view, then by right view, int32 on the device in one copy."""
    parts = [part for side in (0, 1) for part in _couples_of_views(share, num_views, side)]
    packed = to_device(np.concatenate([part.ravel() for part in parts]).astype(np.int32), device)
    return list(packed.split([part.size for part in parts]))


def _sums_over_rows(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x.sum(0, dtype=torch.float64), y.sum(0, dtype=torch.float64)])


def relation(
    A: Tensor, B: Tensor, g: Tensor, e: Tensor, w: Tensor, c: Tensor,
    constants: tuple[float, float, float, tuple[float, float]], share: Share, labels: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """All sweeps: loss, logits, mean, var, and the gradients of A, B, g, e, w and c."""
    from ssl_dist.kernels import relation_sweeps as sweeps

    eps, slope, gamma, (weight_1, weight_0) = constants
    rows, H = A.shape
    M, P, ends = share.num_images, share.num_pairs, (share.num_images, share.lo, share.hi)
    by_left, left_begins, by_right, right_begins = _tables(share, rows // M, A.device)
    # a program has a row of H units in a tile of HP, or BH units of a vector
    HP, BH = max(MIN_TILE, 1 << (H - 1).bit_length()), 64
    warps = min(MAX_WARPS, max(1, HP * A.element_size() // WARP_BYTES))
    tile: Any = {"H": H, "HP": HP, "num_warps": warps, "enable_fp_fusion": True}
    columns: Any = {"H": H, "BH": BH, "num_warps": 1, "enable_fp_fusion": True}
    grid, column_grid = (M, rows // M), (-(-H // BH),)

    counts, pair_h, work = A.new_empty(rows, dtype=torch.int32), torch.empty_like(A), torch.empty_like(A)
    sweeps.moments[grid](A, B, by_left, left_begins, *ends, counts, pair_h, work, **tile)
    sums = reduce(_sums_over_rows(pair_h, work))
    statistics, (scale, shift) = sums.new_empty(3, H), A.new_empty(2, H)
    sweeps.normalization[column_grid](*sums, g, e, statistics, scale, shift, P=P, eps=eps, **columns)

    logits, d = A.new_empty(2, 2, share.hi - share.lo)
    totals, fa = A.new_empty(2, rows), torch.empty_like(A)
    sweeps.sweep_left[grid](
        A, B, scale, shift, w, c, labels, by_left, left_begins, *ends, logits, d, totals, fa, work,
        slope=slope, gamma=gamma, weight_1=weight_1 / P, weight_0=weight_0 / P, **tile,
    )  # fmt: skip
    sums, gradients, of_share = _sums_over_rows(fa, work), A.new_empty(3, H), sums.new_empty(2, H)
    sweeps.weight_gradients[column_grid](*sums, statistics, g, e, w, gradients, of_share, **columns)

    scales = A.new_empty(3, H)
    sweeps.gradient_scales[column_grid](reduce(of_share), statistics, scale, w, scales, P=P, **columns)
    right = (by_right, right_begins, *ends, d, counts, pair_h, fa, work)
    sweeps.sweep_right[grid](A, B, scale, shift, scales, *right, slope=slope, **tile)
    loss, dc = totals.sum(1, dtype=torch.float64).to(A.dtype)
    return loss, logits, statistics[0], statistics[1], [fa, work, *gradients, dc]


class _Relation(torch.autograd.Function):
    """The gradient is computed with the loss, so backward only scales it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        loss, *others, gradients = relation(*arguments)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *torch._foreach_mul(ctx.saved_tensors, grad_loss), None, None, None, None


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
    """As `relation.relation_loss`, with all tensors on a GPU and no obstacle."""
    weights = (1.0, 1.0) if alpha is None else (alpha, 1.0 - alpha)
    tensors = (A.contiguous(), B.contiguous(), bn1.weight, bn1.bias, linear2.weight[0], linear2.bias[0])
    return _Relation.apply(*tensors, (bn1.eps, slope, gamma, weights), share, labels, reduce)
