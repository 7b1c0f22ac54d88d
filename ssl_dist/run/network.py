"""A method on its backbone: with first weights, random or of a file, a run or a name; or as a checkpoint has it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_dist import backbones, methods
from ssl_dist.config import Config, Section, validate
from ssl_dist.config.schema import Backbone as BackboneSection
from ssl_dist.errors import UserError, quoted
from ssl_dist.keys import INIT, hash64
from ssl_dist.methods.base import Info, SSLMethod
from ssl_dist.nn.backbone import Backbone, TokenBackbone
from ssl_dist.nn.layers import key_dropout
from ssl_dist.nn.shapes import without_values
from ssl_dist.run import plugged
from ssl_dist.storage import checkpoint, hub, weights, weights_file

# What is tried of timm where a file is of another backbone: those that people have weights of.
_OF_TIMM = (
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224",
    "vit_small_patch8_224", "vit_base_patch8_224", "vit_small_patch14_dinov2", "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2", "convnext_tiny",
    "convnext_small", "convnext_base", "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224",
    "wide_resnet50_2", "regnety_016",
)  # fmt: skip


def build_method(
    config: Config, method_class: type[SSLMethod], options: Section, info: Info, file: Path | None = None
) -> SSLMethod:
    """The method on its backbone. file: that `backbone.weights` stands for, from which the backbone begins; on the meta
    device it is not read."""
    torch.manual_seed(int(hash64(config.seed, INIT)) & 0x7FFFFFFFFFFFFFFF)
    backbone = build_backbone(config, info.channels)
    key_dropout(backbone)
    refuse_random_layers(backbone, config.backbone.name)
    if file is not None and not next(backbone.parameters()).is_meta:
        backbone.load_state_dict(initial_weights(backbone, config.backbone, file).tensors)
    if config.backbone.freeze_patches:
        if not isinstance(backbone, TokenBackbone):
            raise UserError(
                f"backbone.freeze_patches = true: {config.backbone.name} has no patches; set it to false, or give a "
                "transformer (timm/vit_small_patch16_224)"
            )
        backbone.patch_projection().requires_grad_(False)
    return method_class(backbone, replace(info, feature_dim=backbone.feature_dim, stages=backbone.stages), options)


def build_backbone(config: Config, channels: int) -> Backbone:
    """The backbone of a config for images of so many channels, with weights of torch's global generator."""
    own = config.backbone
    return backbones.build(
        own.name, own.zero_init_residual, channels, config.data.image_size, own.patch_size, own.drop_path
    )


@dataclass(frozen=True)
class Restored:
    """A method as a checkpoint has it, and what else stands there. sha256: of the file."""

    method: SSLMethod
    config: Config
    state: dict[str, Any]
    file: Path
    sha256: str


def restored(path: Path) -> Restored:
    """The method in a run's newest checkpoint, or in a checkpoint file. Raises `UserError`."""
    path, state, digest = checkpoint.load_run(path)
    settings = validate(Config, state["config"], f"{path}: ")
    plugged.recall(settings, path, path.parent.parent if path.parent.name == "checkpoints" else path.parent)
    method_class = methods.find(settings.method.name)
    plugged.require_recorded(settings, str(path))
    options = methods.build_options(method_class, settings.method.options)
    info = Info(**state["info"])
    with without_values():  # whatever sizes `info` has, no memory is taken before the tensors are found to fit
        checkpoint.check_fits(build_method(settings, method_class, options, info), state["method"], path)
    method = build_method(settings, method_class, options, info)
    checkpoint.restore(method, state["method"], path)
    return Restored(method, settings, state, path, digest)


def initial_weights(backbone: nn.Module, settings: BackboneSection, file: Path | None = None) -> weights.Weights:
    """The tensors of `backbone` in `backbone.weights`: a file of another program, a run or its checkpoint (the network
    that evaluation reads), or what a name of the hub stands for. file: the one that an earlier call found; a run may
    have saved another since. Raises `UserError`."""
    given, name = settings.weights, settings.name
    assert given is not None, "it is asked for where there is one"
    path = file or (hub.located(given) if hub.is_name(given) else hub.file_in(Path(given)))
    if not path.exists():
        raise UserError(f"backbone.weights = {quoted(given)}: not a file; give one, or null for random weights")
    try:
        return fitted(path, backbone, settings)
    except weights_file.OwnCheckpoint:
        return _of_run(path, backbone, name)


def fitted(path: Path, backbone: nn.Module, settings: BackboneSection) -> weights.Weights:
    """The tensors of `backbone` in a file of another program. Raises `UserError`, which suggests the backbone that the
    file's shapes are of, and `weights_file.OwnCheckpoint` for a run and its checkpoints."""
    if path.is_dir():
        raise weights_file.OwnCheckpoint(f"{path}: a folder; a run tells its backbone itself, leave backbone.* out")
    there = weights_file.content(path)
    try:
        return weights.match(there, backbone, settings.name, settings.weights_prefix, settings.resize_pos_embed)
    except weights.NoFit as error:
        better = _suggestion(there, settings)
        raise UserError(str(error).replace(weights.RIGHT_NAME, better or weights.RIGHT_NAME)) from None


def _suggestion(there: weights_file.Content, settings: BackboneSection) -> str:
    """A remedy: the backbone whose tensors a file holds; empty where none is found."""
    try:
        import timm
    except ImportError:
        of_timm = []
    else:
        of_timm = [f"timm/{name}" for name in _OF_TIMM if timm.is_model(name)]
    for name in [*backbones.names(), *of_timm]:
        if name == settings.name:
            continue
        try:
            with without_values():
                backbone = backbones.build(name)
            weights.match(there, backbone, name, settings.weights_prefix, resize=True)
        except UserError:
            continue
        return f"give backbone.name={name}, whose shapes it has"
    return ""


def _of_run(path: Path, backbone: nn.Module, name: str) -> weights.Weights:
    run = restored(path)
    tensors = run.method.encoder().state_dict()
    there = weights_file.Content(run.file, run.sha256, tensors, dict.fromkeys(tensors, ""), [], [])
    words = f"the encoder of a run ({run.config.method.name}, {run.config.backbone.name}, step {run.state['step']})"
    try:
        return replace(weights.match(there, backbone, name, ""), format=words)
    except weights.NoFit as error:
        right = f"give backbone.name={run.config.backbone.name}, which the run has"
        raise UserError(str(error).replace(weights.RIGHT_NAME, right)) from None


def refuse_random_layers(module: nn.Module, name: str) -> None:
    """Layers that draw from torch's generator would make a resume inexact and the world size matter."""
    for path, layer in module.named_modules():
        rate = getattr(layer, "p", getattr(layer, "drop_prob", 0.0))
        if type(layer).__name__.startswith(("Drop", "StochasticDepth", "RReLU")) and rate:
            raise UserError(
                f"backbone.name = {quoted(name)}: its layer {path} ({type(layer).__name__}) draws random numbers of "
                "its own; choose a backbone without it"
            )
