"""`ssl-dist explain`: what a config will do, on any number of ranks, without starting anything."""

import torch
from torch import nn

from ssl_dist import backbones, checkpoint, optim, runfolder
from ssl_dist.blueprint import Blueprint, derive
from ssl_dist.config import Config
from ssl_dist.dist import Place


def explain(config: Config, world_size: int, ranks_per_node: int | None = None) -> str:
    """A text of `name: value` lines. Raises `UserError` for everything that could not run."""
    place = Place(0, world_size, 0, ranks_per_node or world_size)
    blueprint = derive(config, place)
    runfolder.check(blueprint.run, config)
    lines = _data(blueprint) | _grid(blueprint) | _training(blueprint) | _memory(blueprint) | _files(blueprint)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _data(b: Blueprint) -> dict[str, str]:
    split, used = b.split, len(b.plan.train_ids)
    part = "" if used == split.count else f", {used} of them used"
    classes = f"{len(split.classes)} classes" if split.labelled else "no labels"
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (b.normalize.mean, b.normalize.std))
    return {
        "data": f"{b.config.data.name}, split {split.split}: {split.count} images{part}, {classes}",
        "normalisation": f"mean {mean}, std {std}",
        "reader": f"{b.config.data.reader}, {b.threads} view thread(s) a rank",
    }


def _grid(b: Blueprint) -> dict[str, str]:
    grid, images = b.grid, b.config.optim.batch_size
    groups = " + ".join(f"{s.num} x {s.size} px" for s in b.specs)
    held = " + ".join(f"{s.num // grid.views} x {s.size} px" for s in b.specs)
    return {
        "method": f"{b.config.method.name} on {b.config.backbone.name}",
        "views": f"{groups} of each image",
        "global batch": f"{images} images, {images * b.num_views} views",
        "ranks": f"{grid.size} = {grid.images} image shard(s) x {grid.views} view shard(s)",
        "each rank": f"{images // grid.images} images, {held} views of each",
    } | b.method_class.explain(b.num_views, images, b.options)


def _training(b: Blueprint) -> dict[str, str]:
    if not b.method_class.trainable:
        return {"training": "none: the weights are written as they are drawn"}
    clock, options = b.clock(), b.config.optim
    points = [0, clock.total_steps // 4, clock.total_steps // 2, clock.total_steps - 1]
    rates = ", ".join(f"{optim.lr(options, b.clock(step)):.3g} at step {step}" for step in dict.fromkeys(points))
    return {
        "length": f"{clock.total_steps} steps = {clock.total_epochs:g} epochs of {clock.steps_per_epoch} steps",
        "optimizer": f"{options.name}, {options.schedule}, rate {rates}",
        "precision": b.config.precision,
    }


def _memory(b: Blueprint) -> dict[str, str]:
    """Bytes on one rank: exact for parameters and input, for activations the outputs of the backbone's layers."""
    grid, config = b.grid, b.config
    element = 8 if config.precision == "fp64" else 4
    with torch.device("meta"):
        backbone = backbones.build(config.backbone.name)
    parameters = sum(p.numel() for p in backbone.parameters())
    images = config.optim.batch_size // grid.images
    inputs = activations = 0
    for spec in b.specs:
        count = images * spec.num // grid.views
        inputs += count * 3 * spec.size**2 * element
        if b.method_class.trainable:
            activations += count * _activations(backbone, spec.size) * (2 if config.precision == "bf16" else element)
    return {
        "backbone": f"{parameters:,} parameters, {backbone.feature_dim} features",
        "memory a rank": f"weights and optimizer {_mib(4 * parameters * element)}, input {_mib(inputs)}, "
        f"activations about {_mib(activations)}",
    }


def _activations(backbone: nn.Module, size: int) -> int:
    """Elements that the leaf layers put out for one image."""
    total = 0

    def count(_module, _args, output):
        nonlocal total
        total += output.numel()

    hooks = [layer.register_forward_hook(count) for layer in backbone.modules() if not list(layer.children())]
    backbone.eval()(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return total


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _files(b: Blueprint) -> dict[str, str]:
    kept = checkpoint.steps(b.run)
    state = f"resumes after step {kept[-1]}" if kept else "new"
    return {"run folder": f"{b.run} ({state})"}
