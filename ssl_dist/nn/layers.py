"""Pieces of networks that several methods share."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def mlp(dims: Sequence[int], last_bias: bool = False, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A projector: Linear, BatchNorm, activation for every width but the last, then Linear. dims: at least [in, out].

    Hidden layers have no bias: the BatchNorm that follows removes it, and what rounding leaves of its gradient would
    differ from one number of ranks to another.
    """
    assert len(dims) >= 2, dims
    layers: list[nn.Module] = []
    for dim_in, dim_out in pairwise(dims[:-1]):
        layers += [nn.Linear(dim_in, dim_out, bias=False), nn.BatchNorm1d(dim_out), activation()]
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1], bias=last_bias))


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 become float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast on the device. Autocast knows no meta device, whose tensors stand for a CPU's here."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, decay: float) -> None:
    """target = decay * target + (1 - decay) * online, for every parameter and floating-point buffer; integers are left.

    decay 0 copies.
    """
    means = [*target.parameters(), *target.buffers()]
    values = [*online.parameters(), *online.buffers()]
    pairs = [pair for pair in zip(means, values, strict=True) if pair[0].is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in pairs], [value for _, value in pairs], 1 - decay)


def target_network(network: Module) -> Module:
    """A copy without gradient and without dropout, for a moving average to begin from."""
    target = copy.deepcopy(network).requires_grad_(False)
    for layer in target.modules():
        if isinstance(layer, KeyedDropout):
            layer.p = 0.0
    return target


def rising_decay(progress: float, first: float) -> float:
    """The decay of an average that rises from `first` to 1 by half a cosine; progress: 0 to 1."""
    return 1 - (1 - first) * (math.cos(math.pi * progress) + 1) / 2


def beside_prediction(z_ND: Tensor, predictor: nn.Module) -> Tensor:
    """Embeddings and what the predictor makes of them, [N, 2D]: one pass of a view, over which alone BatchNorm of
    either runs."""
    return torch.cat([z_ND, predictor(z_ND)], 1)


def freeze_bias_of_keys(bias: nn.Parameter) -> None:
    """Let the middle third of a bias of queries, keys and values keep its value. It adds one number to all scores of a
    query, which the softmax takes away. So its gradient is 0; rounding makes noise of that, which Adam would make as
    large as any gradient, and another on each number of ranks."""
    width = len(bias) // 3

    def without_keys(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:width], torch.zeros_like(gradient[:width]), gradient[2 * width :]])

    bias.register_hook(without_keys)


# ---------------------------------------------------------------------------------------------------- dropout

_rows: ContextVar[Tensor | None] = ContextVar("rows", default=None)

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MULTIPLY = (-4658895280553007687, -7723592293110705685)  # of SplitMix64's finaliser
_SHIFTS = (30, 27, 31)


@contextlib.contextmanager
def keyed_rows(keys: Tensor | None) -> Iterator[None]:
    """A context in which dropout in row n of every batch is drawn from keys[n] (int64 [N], on the rows' device)."""
    token = _rows.set(keys)
    try:
        yield
    finally:
        _rows.reset(token)


def keys_of_rows() -> Tensor | None:
    """The keys of the innermost `keyed_rows`."""
    return _rows.get()


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which torch computes modulo 2**64; its right shift keeps the sign, so mask."""
    for shift, factor in zip(_SHIFTS, (*_MULTIPLY, None), strict=True):
        z = z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            z = z * factor
    return z


def _as_int64(number: int) -> int:
    """A whole number modulo 2**64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _uniform(layer: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Draws float64 [N, ...] in [0, 1): a function of each row's key, the layer and the place in the row alone."""
    keys = _rows.get()
    assert keys is not None, "a network with dropout passes images inside SSLMethod.keyed"
    assert len(keys) == shape[0], (len(keys), shape)
    of_layer = _mix64(keys + _as_int64((layer + 1) * _GOLDEN))
    place = torch.arange(1, shape[1:].numel() + 1, device=device)
    bits = _mix64(of_layer[:, None] + place * _GOLDEN)
    return (((bits >> 11) & ((1 << 53) - 1)).double() / 2**53).view(shape)


class KeyedDropout(nn.Module):
    """Dropout (Srivastava et al., 2014) whose mask is a function of (seed, step, layer, view, image): see `keyed_rows`.

    In evaluation it does nothing, as torch's.
    """

    def __init__(self, p: float, layer: int):
        super().__init__()
        self.p, self.layer = p, layer

    def shape(self, x: Tensor) -> torch.Size:
        return x.shape

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = _uniform(self.layer, self.shape(x), x.device) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)


class KeyedDropPath(KeyedDropout):
    """Stochastic depth (Huang et al., 2016): a residual branch is dropped for whole rows."""

    def shape(self, x: Tensor) -> torch.Size:
        return torch.Size([len(x)] + [1] * (x.dim() - 1))


def key_dropout(network: nn.Module) -> None:
    """Replace every dropout of torch, torchvision and timm in `network` by its keyed twin, numbered in order."""
    number = 0
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            twin = _twin(layer, number)
            if twin is not None:
                setattr(parent, name, twin)
                number += 1


def _twin(layer: nn.Module, number: int) -> KeyedDropout | None:
    if type(layer) is nn.Dropout:
        return KeyedDropout(layer.p, number)
    # Those of torchvision and timm, without importing either: seconds for who has neither in the network.
    if type(layer).__name__ == "StochasticDepth" and getattr(layer, "mode", None) == "row":
        return KeyedDropPath(getattr(layer, "p", 0.0), number)
    if type(layer).__name__ == "DropPath" and getattr(layer, "scale_by_keep", False):
        return KeyedDropPath(getattr(layer, "drop_prob", None) or 0.0, number)
    return None
