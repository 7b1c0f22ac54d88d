"""Features of a backbone by the name of a layer: its output, or the maps of stages, averaged over their places.

Several, joined by +, stand one behind the other: DINO's linear classifiers (Caron et al. 2021, appendix F) read
`blocks.8.class+blocks.9.class+blocks.10.class+blocks.11.class` of a ViT-S and `class+patches` of a ViT-B.
"""

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.nn.backbone import Backbone

OUTPUT = "output"
_MAX_NAME = 100  # characters of a layer in the name of a file, which holds 255 bytes


def width(layer: str, stages: Mapping[str, int], feature_dim: int, setting: str = "layer") -> int:
    """D of a layer of a backbone with these stages and features. Raises `UserError`, which names the setting, where it
    has no such layer."""
    dims = {OUTPUT: feature_dim, **stages}
    names = str(layer).split("+")  # of a program, which may give anything
    for name in names:
        if name not in dims:
            of = f"{quoted(name)} of it is" if len(names) > 1 else "is"
            raise UserError(
                f"{setting} = {quoted(layer)}: {of} no layer here; {did_you_mean(name, dims)}layers, or several joined "
                f"by +: {', '.join(dims)}"
            )
    return sum(dims[name] for name in names)


def of_layer(backbone: Backbone, layer: str, images: Tensor) -> Tensor:
    """Features [N, D] of images [N, C, S, S]."""
    if layer == OUTPUT:
        return backbone(images).flatten(1)
    output, maps = backbone.forward_stages(images)
    parts = [output.flatten(1) if name == OUTPUT else maps[name].mean((2, 3)) for name in layer.split("+")]
    return torch.cat(parts, 1)


def named(name: str, layer: str) -> str:
    """`name` of a file or a tag with a layer behind it, <name>-<layer>, where that is not the output; of a layer with a
    long name its beginning and a hash."""
    if layer == OUTPUT:
        return name
    in_names = re.sub(r"[^\w.+-]", "_", layer)
    if in_names != layer or len(layer) > _MAX_NAME:
        in_names = f"{in_names[: _MAX_NAME - 9]}-{hashlib.sha256(layer.encode()).hexdigest()[:8]}"
    return f"{name}-{in_names}"
