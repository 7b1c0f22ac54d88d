"""Backbones by name: images [N, 3, S, S] -> features [N, D], with the maps of their stages; see `nn.backbone`.

Initial weights are drawn from torch's global generator, which the caller seeds.
"""

import importlib.util
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from ssl_dist.backbones import efficientnet, resnet, resnet_small
from ssl_dist.backbones.alexnet import SMALL, AlexNet
from ssl_dist.backbones.conv4 import Conv4
from ssl_dist.backbones.resnetv2 import ResNetV2
from ssl_dist.backbones.timm_model import TimmModel, timm_package
from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.nn.backbone import Backbone

_TIMM = "timm/"
_SMALL_STEM = "_small_stem"
WIDTHS = (2, 4, 5)

_RESNETS = {f"resnet{depth}": partial(resnet.ResNet, depth) for depth in resnet.LAYERS}
_RESNETS |= {
    f"resnet{depth}x{width}": partial(resnet.ResNet, depth, width) for depth in resnet.LAYERS for width in WIDTHS
}
_RESNETS |= {name + _SMALL_STEM: partial(builder, small_stem=True) for name, builder in _RESNETS.items()}
_BUILDERS: dict[str, Callable[..., Backbone]] = {
    "conv4": Conv4,
    **{f"resnet{depth}": partial(resnet_small.SmallResNet, depth) for depth in resnet_small.DEPTHS},
    **_RESNETS,
    "resnetv2_50": ResNetV2,
    "alexnet": AlexNet,
    "alexnet_small": partial(AlexNet, SMALL),
    **{name: partial(efficientnet.EfficientNet, name) for name in efficientnet.BUILDERS},
}


def names() -> list[str]:
    """The names of the backbones defined here; those of timm are not listed."""
    return list(_BUILDERS)


def check(name: str, zero_init_residual: bool = False) -> None:
    """Raises `UserError` with the nearest name when there is no backbone `name`, or when it lacks the option; builds
    nothing."""
    if name.startswith(_TIMM):
        available = [_TIMM + model for model in timm_package().list_models()]
        remedy = "ssl_dist.backbones.names() and timm.list_models() list them"
    else:
        available = names()
        plain = [name for name in available if not re.search(rf"\dx\d|{_SMALL_STEM}", name)]
        remedy = (
            f"backbones: {', '.join(plain)}, and timm/<name> for those of timm; those from resnet18 to resnet200 also "
            f"as resnet18x2, x4 or x5 (wide) and with {_SMALL_STEM} (for images of 32 px)"
        )
    if name not in available:
        hint = _hint_of_timm(name, available) or did_you_mean(name, available)
        raise UserError(f"backbone.name = {quoted(name)}: no such backbone; {hint}{remedy}")
    if zero_init_residual and name not in _RESNETS:
        raise UserError(
            f"backbone.zero_init_residual = true: backbone {name} has no such option (resnet18 to resnet200 have); "
            "set it to false"
        )


def _hint_of_timm(name: str, own: list[str]) -> str:
    """The name of timm that `name` is without its `timm/`, or nearly so and near none of `own`; as `did_you_mean`."""
    if name.startswith(_TIMM) or importlib.util.find_spec("timm") is None:
        return ""
    models = timm_package().list_models()
    near = [name] if name in models else [] if did_you_mean(name, own) else get_close_matches(name, models, n=1)
    return f"did you mean '{_TIMM}{near[0]}'? " if near else ""


def build(name: str, zero_init_residual: bool = False) -> Backbone:
    """The backbone `name` with initial weights. Raises `UserError` when there is none."""
    check(name, zero_init_residual)
    if name.startswith(_TIMM):
        return TimmModel(name.removeprefix(_TIMM))
    return _BUILDERS[name](zero_init_residual=True) if zero_init_residual else _BUILDERS[name]()
