"""Synchronised BatchNorm on GPUs. Same parameters, buffers and state keys as torch's.

The kernels are those behind `nn.SyncBatchNorm`, with sums in float32 at least. That module makes the host wait for the
GPU three times a layer and pass (masks for ranks without rows, of which a training has none); this one never waits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_dist.nn.batchnorm import SyncBatchNorm, statistics, update_running


class _Normalize(torch.autograd.Function):
    """y = weight (x - mean) rstd + bias (Ioffe & Szegedy, 2015). mean, rstd [C]; counts int32 [W], of the ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, counts: Tensor,
        eps: float, reduce: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd, counts)
        ctx.reduce = reduce
        return torch.batch_norm_elemt(x, weight, bias, mean, rstd, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, counts = ctx.saved_tensors
        affine = weight is not None
        grad = _dense(grad)
        total, product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, rstd, weight, ctx.needs_input_grad[0], affine, affine
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            total, product = ctx.reduce(torch.stack([total, product]))
            grad_x = torch.batch_norm_backward_elemt(grad, x, mean, rstd, weight, total, product, counts)
        if not affine:
            return grad_x, *[None] * 7
        return grad_x, grad_weight, grad_bias, *[None] * 5


class CudaSyncBatchNorm(SyncBatchNorm):
    """A BatchNorm on the GPUs of several ranks. reduce: a sum over the ranks; gather: [...] -> [W, ...]; no gradient.

    Every rank must have elements.
    """

    def __init__(self, original: _BatchNorm, reduce: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]):
        super().__init__(original, reduce)
        self.gather = gather

    def normalize(self, x: Tensor) -> Tensor:
        x, channels = _dense(x), x.shape[1]
        running_mean, running_var, number = statistics(self)
        with torch.no_grad():
            own_mean, own_rstd = torch.batch_norm_stats(x, self.eps)
            of_ranks = self.gather(torch.cat([own_mean, own_rstd, own_mean.new_full((1,), x.numel() // channels)]))
            mean_WC, rstd_WC, counts_W1 = of_ranks.tensor_split([channels, 2 * channels], 1)
            counts = counts_W1[:, 0]
            by_kernel = self.momentum is not None  # else the rate depends on the number of batches, on the device
            mean, rstd = torch.batch_norm_gather_stats_with_counts(
                x, mean_WC, rstd_WC, running_mean if by_kernel else None, running_var if by_kernel else None,
                self.momentum or 0.0, self.eps, counts,
            )  # fmt: skip
            if not by_kernel:
                update_running(self, mean, (rstd**-2 - self.eps).clamp_(min=0), counts.sum())
            else:
                number.add_(1)
        return _Normalize.apply(x, self.weight, self.bias, mean, rstd, counts.int(), self.eps, self.reduce)


def _dense(x: Tensor) -> Tensor:
    """x in one of the orders that the kernels read fast."""
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()
