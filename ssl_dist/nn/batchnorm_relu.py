"""BatchNorm, a sum, ReLU and the mean of 2x2 pixels as one operation, for networks that are built of them."""

from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_dist.kernels.batchnorm_relu import Sweeps
from ssl_dist.nn.batchnorm import SyncBatchNorm, gradient_map


def batchnorm_relu(layer: nn.Module, x: Tensor, added: Tensor | None = None, pooled: bool = False) -> Tensor:
    """relu(layer(x) + added), and of that the mean of every 2x2 pixels where `pooled`.

    x, added: [N, C, H, W]. In a training on a CPU this is one operation that keeps x alone for the backward pass.
    """
    assert added is None or not pooled, "no network pools what it adds"
    if _is_one_operation(layer, x, added, pooled):
        return layer(x, partial(_NormalizeRelu.apply, added, pooled))
    y = layer(x)
    if added is not None:
        y += added
    y = nn.functional.relu(y, inplace=True)
    return nn.functional.avg_pool2d(y, 2) if pooled else y


def _is_one_operation(layer: nn.Module, x: Tensor, added: Tensor | None, pooled: bool) -> TypeGuard[SyncBatchNorm]:
    if not isinstance(layer, SyncBatchNorm) or layer.relu_sweeps is None or torch.compiler.is_compiling():
        return False
    alike = added is None or (added.shape == x.shape and added.dtype == x.dtype)
    plain = layer.training and layer.affine and not layer._modules
    return plain and alike and layer.relu_sweeps.take(x, pooled)


class _NormalizeRelu(torch.autograd.Function):
    """The equations are those of `SyncBatchNorm`, of the gradient that ReLU lets pass."""

    @staticmethod
    def forward(
        ctx: Any, added: Tensor | None, pooled: bool, layer: SyncBatchNorm, x: Tensor, weight: Tensor, bias: Tensor,
        *moments: Tensor,
    ) -> Tensor:  # fmt: skip
        assert layer.relu_sweeps is not None
        out = _sweeps(layer.relu_sweeps, x, pooled, weight, bias, moments).forward(added)
        ctx.save_for_backward(x, weight, bias, None if added is None else out, *moments)
        ctx.pooled, ctx.sweeps = pooled, layer.relu_sweeps
        ctx.reduce = layer.reduce  # of the forward pass: the layer may have others by then
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, out, *moments = ctx.saved_tensors
        sweeps, grad_added = _sweeps(ctx.sweeps, x, ctx.pooled, weight, bias, moments), None
        if out is None:
            grad_bias, products = sweeps.products(grad)
        else:
            grad_bias, products, grad_added = sweeps.masked_products(grad, out)
        grad_weight, maps = gradient_map(grad_bias, products, weight, moments, ctx.reduce)
        if grad_added is None:
            grad_x = sweeps.gradient(grad, *maps[:2])
        else:
            grad_x = sweeps.gradient_of_masked(grad_added, *maps[:2])
        of_parameters = grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
        return grad_added, None, None, grad_x, *of_parameters, *[None] * 3


def _sweeps(kind: type[Sweeps], x: Tensor, pooled: bool, weight: Tensor, bias: Tensor, moments: Any) -> Sweeps:
    mean, rstd, _ = moments
    return kind(x, pooled, mean, rstd * weight, bias.double())
