"""Backbones by name: images [N, 3, S, S] -> features [N, D], with the maps of their stages; see `base.Backbone`.

Initial weights are drawn from torch's global generator, which the caller seeds.
"""

import difflib
from functools import partial

from torch import nn

from ssl_dist.backbones import resnet, resnet_small
from ssl_dist.backbones.conv4 import Conv4
from ssl_dist.errors import UserError

_TIMM = "timm/"

_BUILDERS = {
    "conv4": Conv4,
    **{f"resnet{depth}": partial(resnet_small.SmallResNet, depth) for depth in resnet_small.DEPTHS},
    **{f"resnet{depth}": partial(resnet.ResNet, depth) for depth in resnet.LAYERS},
}


def names() -> list[str]:
    """Every backbone of our own; timm's come on top."""
    return list(_BUILDERS)


def check(name: str) -> None:
    """Raises `UserError` with the nearest name when there is no backbone `name`; builds nothing."""
    if name.startswith(_TIMM):
        known = [_TIMM + model for model in _timm().list_models()]
        rest = "ssl_dist.backbones.names() and timm.list_models() list them"
    else:
        known = names()
        rest = f"backbones: {', '.join(known)}, and timm/<name> for those of timm"
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"backbone.name = {name!r}: no such backbone; {hint}{rest}")


def build(name: str) -> nn.Module:
    """The backbone `name` with initial weights. Raises `UserError` when there is none."""
    check(name)
    if not name.startswith(_TIMM):
        return _BUILDERS[name]()
    model = _timm().create_model(name.removeprefix(_TIMM), pretrained=False, num_classes=0)
    # Some models widen their features in a last layer before the classifier.
    model.feature_dim = getattr(model, "head_hidden_size", None) or model.num_features
    return model


def _timm():
    """timm, which is no requirement and takes seconds to import."""
    try:
        import timm
    except ImportError:
        raise UserError("backbone.name = timm/...: timm is not installed; pip install timm") from None
    return timm
