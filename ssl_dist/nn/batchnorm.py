"""Synchronised BatchNorm for CPU tensors: torch's own refuses them. Same parameters, buffers and state keys as torch's.

Statistics run over all ranks, so one rank with the whole batch and many ranks with parts of it compute the same. The
per-channel sums are taken, and exchanged, in float64, and so are the maps computed that are applied to the elements:
with the moments known, BatchNorm is an affine map per channel, and its gradient is another one.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_dist.errors import UserError
from ssl_dist.kernels.batchnorm_relu import Sweeps
from ssl_dist.kernels.moments import Elements
from ssl_dist.nn import batchnorm_ops
from ssl_dist.nn.batchnorm_ops import Moments


class _Normalize(torch.autograd.Function):
    """A twin's `scaled` with its `gradients`."""

    @staticmethod
    def forward(
        ctx: Any, layer: "SyncBatchNorm", x: Tensor, weight: Tensor | None, bias: Tensor | None, *moments: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *moments)
        # The ranks of the forward pass, of which the layer may have others by then.
        ctx.gradients, ctx.reduce = layer.gradients, layer.reduce
        return layer.scaled(x, weight, bias, moments)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *moments = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = ctx.gradients(grad, x, weight, moments, ctx.reduce)
        of_parameters = (None, None) if weight is None else (grad_weight, grad_bias)
        return None, grad_x, *of_parameters, *[None] * 3


def global_moments(x: Tensor, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel (dimension 1) over all ranks, and the number of elements behind them.

    All float64, as is what `gather` gets. Sums of squares are taken about the rank's own mean and shifted to the global
    one (Chan, Golub & LeVeque, 1983): nothing cancels, and one exchange is enough.
    """
    elements = Elements(x)
    mean, squares = elements.moments()
    of_ranks = gather(torch.cat([mean, squares, mean.new_full((1,), elements.count)]))
    mean_WC, squares_WC, count_W1 = of_ranks.tensor_split([x.shape[1], 2 * x.shape[1]], 1)
    total = count_W1.sum()
    global_mean = (mean_WC * count_W1).sum(0) / total
    squares = (squares_WC + (mean_WC - global_mean).square() * count_W1).sum(0)
    return global_mean, squares / total, total


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm over all ranks. reduce: a sum over the ranks; gather: [...] -> [W, ...]; both without gradient.

    y = weight xhat + bias with xhat = (x - mean) rstd (Ioffe & Szegedy, 2015); the moments are float64 [C]. What the
    original has inside, such as an activation, is applied to y, in its order.
    """

    collectives: ClassVar[tuple[str, ...]] = ("reduce", "gather")  # attributes; another group of ranks may have others
    relu_sweeps: type[Sweeps] | None = Sweeps  # of nn/batchnorm_relu.py; None where it has none
    traceable = True  # False where `collectives` change from pass to pass

    def __init__(self, original: _BatchNorm, reduce: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]):
        assert original.track_running_stats, "only BatchNorm with running statistics"
        super().__init__(original.num_features, original.eps, original.momentum, original.affine, device="meta")
        self._parameters = original._parameters
        self._buffers = original._buffers
        self._modules = original._modules
        self.training = original.training
        self.reduce, self.gather = reduce, gather
        self.number = batchnorm_ops.register(self)

    def __deepcopy__(self, memo: dict) -> "SyncBatchNorm":
        """A copy with the same ranks: to copy the bound method `reduce` would copy its world."""
        memo |= {id(call): call for call in map(self.__dict__.get, self.collectives)}
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__setstate__(copy.deepcopy(self.__dict__, memo))
        clone.number = batchnorm_ops.register(clone)
        return clone

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.dim()}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {x.shape[1]}")

    def forward(self, x: Tensor, normalize: Callable[..., Tensor] | None = None) -> Tensor:
        """normalize: in a training, in the place of the function that normalises x [N, C, ...] and has the gradients.
        It gets the layer, x, weight, bias and the moments."""
        y = self._by_moments(x, normalize) if self.training else super().forward(x)
        for module in self.children():
            y = module(y)
        return y

    def _by_moments(self, x: Tensor, normalize: Callable[..., Tensor] | None) -> Tensor:
        self._check_input_dim(x)
        if torch.compiler.is_compiling() and self.traceable:
            return batchnorm_ops.normalize(self.number, x, self.weight, self.bias, statistics(self))
        return self._normalize(x, normalize)

    def _normalize(self, x: Tensor, normalize: Callable[..., Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            moments = self.moments(x, *statistics(self))
        return (normalize or _Normalize.apply)(self, x, self.weight, self.bias, *moments)

    def moments(self, x: Tensor, running_mean: Tensor, running_var: Tensor, number: Tensor) -> Moments:
        """Mean, 1 / standard deviation and number of elements of the batch of all ranks, which the running statistics
        follow."""
        mean, var, count = global_moments(x, self.gather)
        if count < 2:  # as torch; the same on every rank
            raise ValueError(f"expected more than 1 value per channel when training, got {int(count)} on all ranks")
        update_statistics((running_mean, running_var, number), self.momentum, mean, var, count)
        return mean, torch.rsqrt(var + self.eps), count

    def moments_like(self, x: Tensor) -> Moments:
        """Empty tensors in the form of `moments`."""
        mean = x.new_empty(x.shape[1], dtype=torch.float64)
        return mean, torch.empty_like(mean), x.new_empty((), dtype=torch.float64)

    def scaled(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Moments) -> Tensor:
        mean, rstd, _ = moments
        scale = rstd if weight is None else rstd * weight
        offset = torch.zeros_like(rstd) if bias is None else bias.double()
        return Elements(x).affine(mean, scale, offset)

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, moments: Moments,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Of x, weight and bias (where there are none: of 1 and 0). reduce: in the place of the layer's own."""
        mean = moments[0]
        elements = Elements(x)
        grad_bias, products = elements.products(grad, mean)
        grad_weight, maps = gradient_map(grad_bias, products, weight, moments, reduce or self.reduce)
        grad_x = elements.affine2(grad, mean, *maps)
        if weight is None:
            return grad_x, grad_weight, grad_bias
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def gradient_map(
    grad_bias: Tensor, products: Tensor, weight: Tensor | None, moments: Moments, reduce: Callable[[Tensor], Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The gradient of the weight, and the map from x and y's gradient to x's: a, b and c of (x - mean) a + b + grad c.

    grad_bias, products: the sums of grad and of grad (x - mean) over this rank's elements.
    """
    _, rstd, count = moments
    grad_weight = products * rstd
    # The moments depend on every x: grad_x = weight rstd (grad - mean(grad) - xhat mean(grad xhat)).
    mean_grad, mean_product = reduce(torch.stack([grad_bias, grad_weight])) / count
    scale = rstd if weight is None else rstd * weight
    return grad_weight, (-scale * rstd * mean_product, -scale * mean_grad, scale)


def update_running(layer: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
    """Torch's update of the running statistics, from moments over `count` elements; the stored variance is unbiased."""
    update_statistics(statistics(layer), layer.momentum, mean, var, count)


def update_statistics(
    running: tuple[Tensor, Tensor, Tensor], momentum: float | None, mean: Tensor, var: Tensor, count: Tensor | int
) -> None:
    """`update_running` of what `statistics` gives."""
    *means, number = running
    number.add_(1)
    for running_one, new in zip(means, (mean, var * (count / (count - 1))), strict=True):
        if momentum is None:  # torch keeps the plain mean of all batches
            running_one.lerp_(new.to(running_one.dtype), (1 / number.double()).to(running_one.dtype))
        else:
            running_one.lerp_(new.to(running_one.dtype), momentum)


def statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The running mean and variance, and the number of batches behind them."""
    mean, var, number = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None and var is not None and number is not None, "only BatchNorm with running statistics"
    return mean, var, number


TORCH_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_twin(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether the twin does all that `layer` does: it drops what others than torch's own and timm's add, and keeps
    statistics."""
    kind = type(layer)
    # timm's has dropout and an activation inside. It is not imported: seconds for who has nothing of it.
    is_timms = kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
    return isinstance(layer, _BatchNorm) and (kind in TORCH_BATCHNORMS or is_timms) and layer.track_running_stats


def is_of_batches(layer: nn.Module) -> bool:
    """Whether `layer` normalises by the moments of a batch or keeps their mean: any BatchNorm, and what other layers
    with running statistics there are (InplaceAbn, EvoNorm's B series, InstanceNorm that tracks them), unless frozen."""
    running = {"running_mean", "running_var"} & dict(layer.named_buffers(recurse=False)).keys()
    return isinstance(layer, _BatchNorm) or (bool(running) and not type(layer).__name__.startswith("Frozen"))


def refuse_others(module: nn.Module) -> None:
    """Raises `UserError` for a layer of batches without a twin: its statistics would be those of each rank alone."""
    for name, layer in module.named_modules():
        if is_of_batches(layer) and not has_twin(layer):
            raise UserError(
                f"backbone.name: its layer {name.removeprefix('backbone.')} ({type(layer).__name__}) cannot be "
                "synchronised over several ranks; train on one rank, or choose another backbone"
            )


def synchronize(module: nn.Module, twin: Callable[[_BatchNorm], SyncBatchNorm]) -> nn.Module:
    """`module` with every BatchNorm that has a twin replaced by it; parameters and state keys stay."""
    if has_twin(module):
        return twin(module)
    for name, child in module.named_children():
        setattr(module, name, synchronize(child, twin))
    return module


# ---------------------------------------------------------------------------------------------------- views alone

_view: ContextVar[int | None] = ContextVar("view", default=None)


@contextlib.contextmanager
def one_view(view_id: int) -> Iterator[None]:
    """A context in which networks, and so their BatchNorm, get the images of a single view."""
    token = _view.set(view_id)
    try:
        yield
    finally:
        _view.reset(token)


_kept: ContextVar[bool] = ContextVar("kept", default=False)


@contextlib.contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """A context in which a training `module` normalises as ever, and its running statistics stay what they are: a pass
    that is made a second time counts once."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    before = [statistics(layer) for layer in layers]
    for layer, (mean, var, number) in zip(layers, before, strict=True):
        layer.running_mean, layer.running_var, layer.num_batches_tracked = mean.clone(), var.clone(), number.clone()
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)
        for layer, (mean, var, number) in zip(layers, before, strict=True):
            layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, number


class ViewColumns:
    """BatchNorm where views pass one at a time and are spread over ranks: each column of the grid has views of its own.

    In a pass of one view the moments are those of the ranks of the column, which hold that view. Running statistics
    take the views one after the other, so each pass leaves its own here and `settle` applies all of them, in the order
    of views, on every rank: what one process would have done. Passes outside of `one_view` are left as they are.
    """

    def __init__(self, module: nn.Module, to_column: Callable[[_BatchNorm], Callable[[], None]]):
        """to_column: restricts a layer to the ranks of its column, and returns what undoes it."""
        self.layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.to_column = to_column
        self.passes: dict[_BatchNorm, list[tuple[int, Tensor, Tensor]]] = {layer: [] for layer in self.layers}
        self._orders: dict[tuple[int, ...], Tensor] = {}
        self._undo: dict[_BatchNorm, Callable[[], None]] = {}
        for layer in self.layers:
            if isinstance(layer, SyncBatchNorm):
                layer.traceable = False
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after)

    def _before(self, layer: _BatchNorm, _inputs: tuple[Tensor, ...]) -> None:
        view_id = _view.get()
        if view_id is None or not layer.training:
            return
        (mean, var, number), momentum, restore = statistics(layer), layer.momentum, self.to_column(layer)
        # Fresh buffers and a momentum of 1: after the pass they hold the statistics of this view alone.
        own_mean, own_var = torch.zeros_like(mean), torch.zeros_like(var)
        layer.running_mean, layer.running_var, layer.momentum = own_mean, own_var, 1.0

        def undo() -> None:
            if not _kept.get():
                self.passes[layer].append((view_id, own_mean, own_var))
            layer.running_mean, layer.running_var, layer.momentum = mean, var, momentum
            number.sub_(1)
            restore()

        self._undo[layer] = undo

    def _after(self, layer: _BatchNorm, _inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        if layer in self._undo:
            self._undo.pop(layer)()

    @torch.no_grad()
    def settle(self, gather_columns: Callable[[Tensor], Tensor]) -> None:
        """Update the running statistics by the passes since the last time.

        gather_columns: a tensor of this rank -> those of one rank of every column [columns, ...]. Layers that saw the
        same views go through it together.
        """
        together: dict[tuple, list[_BatchNorm]] = {}
        for number, layer in enumerate(self.layers):
            if self.passes[layer]:
                ids = tuple(view_id for view_id, _, _ in self.passes[layer])
                alone = number if layer.momentum is None else None  # its rate falls with its own number of batches
                together.setdefault((ids, layer.momentum, alone, statistics(layer)[0].dtype), []).append(layer)
        for (ids, *_), layers in together.items():
            self._settle(layers, ids, gather_columns)

    def _settle(
        self, layers: list[_BatchNorm], ids: tuple[int, ...], gather_columns: Callable[[Tensor], Tensor]
    ) -> None:
        buffers = [buffer for layer in layers for buffer in statistics(layer)[:2]]
        numbers = [statistics(layer)[2] for layer in layers]
        own = [torch.cat([values for layer in layers for values in self.passes[layer][p][1:]]) for p in range(len(ids))]
        rows = gather_columns(torch.stack(own).double()).flatten(0, 1)  # [columns * passes, channels of all buffers]
        running = torch.cat(buffers)
        for row in rows[self._view_order(ids, rows.device, gather_columns)].to(running.dtype):
            torch._foreach_add_(numbers, 1)
            factor = layers[0].momentum
            running.lerp_(row, (1 / numbers[0].double()).to(running.dtype) if factor is None else factor)
        torch._foreach_copy_(buffers, running.split([len(buffer) for buffer in buffers]))
        for layer in layers:
            self.passes[layer].clear()

    def _view_order(
        self, ids: tuple[int, ...], device: torch.device, gather_columns: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The gathered rows [columns * passes] in the order of views. A GPU is waited for the first time only: all
        ranks pass their views in the same order every time."""
        if ids not in self._orders:
            ids_of_columns = gather_columns(torch.tensor(ids, dtype=torch.float64, device=device)).flatten()
            self._orders[ids] = torch.argsort(ids_of_columns, stable=True)
        return self._orders[ids]
