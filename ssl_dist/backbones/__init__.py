"""Backbones by name: images [N, C, S, S] -> features [N, D], with the maps of their stages; see `nn.backbone`.

A file has its backbones in `BACKBONES`: names, and what makes each. It is imported when one of them is asked for, as
some need packages that take a second. Initial weights are drawn from torch's global generator, which the caller seeds.
"""

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches

from ssl_dist import plugins
from ssl_dist.backbones import timm_model
from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.nn.backbone import Backbone

_TIMM = "timm/"
_RESNETS = [f"resnet{depth}{wide}" for wide in ("", "x2", "x4", "x5") for depth in (18, 34, 50, 101, 200)]
_RESNETS += [f"{name}_small_stem" for name in _RESNETS]
_FILES = {
    "conv4": ["conv4"],
    "resnet_small": ["resnet8", "resnet20", "resnet32", "resnet56"],
    "resnet": _RESNETS,
    "resnetv2": ["resnetv2_50"],
    "alexnet": ["alexnet", "alexnet_small"],
    "efficientnet": ["efficientnet_b0", "efficientnet_v2_s"],
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def names() -> list[str]:
    """The names of the backbones defined here and of plugins; those of timm are not listed."""
    return [*_FILE_OF, *_outside()]


def _outside() -> dict[str, plugins.Plugin]:
    return plugins.found(plugins.BACKBONES, _FILE_OF)


def check(name: str, zero_init_residual: bool = False, patch_size: int | None = None, drop_path: float = 0.0) -> None:
    """Raises `UserError` with the nearest name when there is no backbone `name`, or when it lacks the option; builds
    nothing."""
    if name.startswith(_TIMM):
        available = timm_model.names()
        remedy = "ssl_dist.backbones.names() and timm.list_models() list them"
    else:
        available = names()
        plain = [name for name in available if not re.search(r"\dx\d|_small_stem", name)]
        remedy = (
            f"backbones: {', '.join(plain)}, and timm/<name> for those of timm; those from resnet18 to resnet200 also "
            "as resnet18x2, x4 or x5 (wide) and with _small_stem (for images of 32 px)"
        )
    if name not in available:
        hint = _hint_of_timm(name, available) or did_you_mean(name, available)
        known = plugins.absent() or f"{remedy}; --plugins FILE adds your own"
        raise UserError(f"backbone.name = {quoted(name)}: no such backbone; {hint}{known}")
    if zero_init_residual and name not in _RESNETS:
        raise UserError(
            f"backbone.zero_init_residual = true: backbone {name} has no such option (resnet18 to resnet200 have); "
            "set it to false"
        )
    for key, value, usual in (("patch_size", patch_size, "null"), ("drop_path", drop_path, "0")):
        if value and not name.startswith(_TIMM):
            raise UserError(
                f"backbone.{key} = {value:g}: backbone {name} has no such option (timm's transformers have); set it to "
                f"{usual}"
            )


def _hint_of_timm(name: str, own: list[str]) -> str:
    """The name of timm that `name` is without its `timm/`, or nearly so and near none of `own`; as `did_you_mean`."""
    if name.startswith(_TIMM) or importlib.util.find_spec("timm") is None:
        return ""
    models = [model.removeprefix(_TIMM) for model in timm_model.names()]
    near = [name] if name in models else [] if did_you_mean(name, own) else get_close_matches(name, models, n=1)
    return f"did you mean '{_TIMM}{near[0]}'? " if near else ""


def build(
    name: str,
    zero_init_residual: bool = False,
    in_channels: int = 3,
    image_size: int | None = None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
) -> Backbone:
    """The backbone `name` for images of so many channels, with initial weights. image_size: side in pixels of images
    for which a transformer learns positions, others get theirs from these; None: as timm has it. Raises `UserError`
    when there is none, or when it lacks an option."""
    check(name, zero_init_residual, patch_size, drop_path)
    options: dict[str, int] = {"zero_init_residual": True} if zero_init_residual else {}
    options |= {} if in_channels == 3 else {"in_channels": in_channels}
    if (plugin := _outside().get(name)) is not None:
        backbone = _of_plugin(name, plugin, options)
    elif name.startswith(_TIMM):
        backbone = timm_model.build(name, in_channels, image_size, patch_size, drop_path)
    else:
        builders: dict[str, Callable[..., Backbone]] = importlib.import_module(
            f"ssl_dist.backbones.{_FILE_OF[name]}"
        ).BACKBONES
        backbone = builders[name](**options)
    backbone.in_channels = in_channels
    return backbone


def _of_plugin(name: str, plugin: plugins.Plugin, options: dict[str, int]) -> Backbone:
    make = plugin.load()
    if options and "in_channels" not in inspect.signature(make).parameters:
        raise UserError(
            f"{plugin.source}: backbone {name} takes images of 3 channels, and these have {options['in_channels']}; "
            "give its constructor the argument in_channels"
        )
    backbone = make(**options)
    if not isinstance(backbone, Backbone) or not {"feature_dim", "stages"} <= {*dir(backbone)}:
        base = "ssl_dist.nn.backbone.Backbone"
        raise UserError(f"{plugin.source}: backbone {name} must be a {base} with feature_dim and stages")
    return backbone
