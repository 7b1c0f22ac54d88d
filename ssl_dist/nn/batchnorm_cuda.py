"""Synchronised BatchNorm on GPUs. Same parameters, buffers and state keys as torch's.

The kernels are those behind `nn.SyncBatchNorm`, with sums in float32 at least. That module makes the host wait for the
GPU three times a layer and pass (masks for ranks without rows, of which a training has none); this one never waits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ssl_dist.nn.batchnorm import SyncBatchNorm, update_statistics
from ssl_dist.nn.batchnorm_ops import Moments


class CudaSyncBatchNorm(SyncBatchNorm):
    """A BatchNorm on the GPUs of several ranks.

    Every rank must have elements. The moments are float32 at least.
    """

    relu_sweeps = None

    def moments(self, x: Tensor, running_mean: Tensor, running_var: Tensor, number: Tensor) -> Moments:
        x, channels = _dense(x), x.shape[1]
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
            var = (rstd**-2 - self.eps).clamp_(min=0)
            update_statistics((running_mean, running_var, number), None, mean, var, counts.sum())
        else:
            number.add_(1)
        return mean, rstd, counts_W1.sum(0, dtype=torch.int32)

    def moments_like(self, x: Tensor) -> Moments:
        mean = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        return mean, torch.empty_like(mean), x.new_empty(1, dtype=torch.int32)

    def scaled(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Moments) -> Tensor:
        mean, rstd, _ = moments
        return torch.batch_norm_elemt(_dense(x), weight, bias, mean, rstd, self.eps)

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, moments: Moments,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (mean, rstd, count), affine = moments, weight is not None
        grad, x = _dense(grad), _dense(x)
        total, product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, rstd, weight, True, affine, affine
        )
        total, product = (reduce or self.reduce)(torch.stack([total, product]))
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, rstd, weight, total, product, count)
        if not affine:
            return grad_x, torch.zeros_like(mean), torch.zeros_like(mean)
        return grad_x, grad_weight, grad_bias


def _dense(x: Tensor) -> Tensor:
    """x in one of the orders that the kernels read fast."""
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()
