"""The twins of BatchNorm as operations that torch.compile puts into its graphs without looking inside.

Their kernels and exchanges between ranks cannot be traced, and a graph would end at every BatchNorm. A graph holds
tensors and numbers, so a layer is named by its number here.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]  # mean, 1 / standard deviation, number of elements behind them


class Twin(Protocol):
    """What these operations call of a layer; its arguments are all that it may change."""

    def moments(self, x: Tensor, running_mean: Tensor, running_var: Tensor, number: Tensor) -> Moments: ...
    def moments_like(self, x: Tensor) -> Moments: ...
    def scaled(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Moments) -> Tensor: ...
    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor | None, moments: Moments) -> Moments: ...


_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Twin) -> int:
    """The number of a layer, which is forgotten with it."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def normalize(
    layer: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """x normalised by the moments of the batch of all ranks, which the running statistics follow."""
    moments = _moments(x.detach(), *running, layer)  # their gradient is in that of `_scaled`
    return _scaled(x, weight, bias, *moments, layer)


@torch.library.custom_op(
    "ssl_dist::batchnorm_moments", mutates_args=("running_mean", "running_var", "number"), device_types=("cpu", "cuda")
)
def _moments(
    x: Tensor, running_mean: Tensor, running_var: Tensor, number: Tensor, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _layers[layer].moments(x, running_mean, running_var, number)


@_moments.register_fake
def _(x: Tensor, running_mean: Tensor, running_var: Tensor, number: Tensor, layer: int) -> Moments:
    return _layers[layer].moments_like(x)


@torch.library.custom_op("ssl_dist::batchnorm_scaled", mutates_args=())
def _scaled(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, count: Tensor, layer: int
) -> Tensor:
    return _layers[layer].scaled(x, weight, bias, (mean, rstd, count))


@_scaled.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _empty_like(x)


@torch.library.custom_op("ssl_dist::batchnorm_gradients", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, count: Tensor, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _layers[layer].gradients(grad, x, weight, (mean, rstd, count))


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, *_: Any) -> Moments:
    like = mean if weight is None else weight
    return _empty_like(x), torch.empty_like(like), torch.empty_like(like)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, mean, rstd, count, ctx.layer = inputs
    ctx.save_for_backward(x, weight, mean, rstd, count)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd, count = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _gradients(grad, x, weight, mean, rstd, count, ctx.layer)
    of_parameters = (None, None) if weight is None else (grad_weight, grad_bias)
    return grad_x, *of_parameters, *[None] * 4


_scaled.register_autograd(_backward, setup_context=_keep)


def _empty_like(x: Tensor) -> Tensor:
    """In the order of x where its channels lie innermost or its elements in a row; else in a row."""
    kept = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x) if kept else x.new_empty(x.shape)
