"""Linear probe: a linear classifier on a frozen backbone, trained on images.

It reads the backbone's output, as in the papers' tables; or there is one for every stage's map, as in Zhang, Isola &
Efros, "Split-brain autoencoders" (CVPR 2017), and SeLa (Asano et al., ICLR 2020): the map is pooled to about 9,000
values, normalised by a BatchNorm without weights, and a linear layer reads all of it. All stages train in one pass.
"""

import math
from functools import reduce
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, Section
from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World, accuracy
from ssl_dist.nn import features
from ssl_dist.nn.features import OUTPUT
from ssl_dist.nn.layers import at_least_float32

# Kernel, stride and padding of SeLa's max-pooling on the maps of its AlexNet.
ALEXNET_POOLING = {"conv1": (6, 6, 3), "conv2": (4, 4, 0), "conv3": (3, 3, 1), "conv4": (3, 3, 1), "conv5": (2, 2, 0)}
MAX_POOLED_VALUES = 9000  # of another map, after pooling to an even grid of means


class Options(Section):
    layer: str = Field(
        OUTPUT,
        description="of the one probe where stages is null: output, or stages joined by +, each averaged over its "
        "places, as blocks.10.class+blocks.11.class",
    )
    stages: Literal["all"] | list[str] | None = Field(
        None, description="null: on the output, or on `layer`; all, or a list of stages: one probe on the map of each"
    )
    batchnorm: Literal["frozen", "batch"] = Field(
        "frozen",
        description="of the backbone: frozen, its running statistics; batch: training mode, as in SeLa's ResNet probe",
    )
    init: PositiveFloat | Literal["xavier"] | None = Field(
        None,
        description="a number: weights from N(0, init), 0.01 in SFRIK and VICReg; xavier: Glorot's uniform, SeLa; both "
        "with intercepts of 0; null: torch's own",
    )


class Method(SSLMethod[Options]):
    needs_labels = True
    num_views = 1

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone.requires_grad_(False), info, options)
        if info.num_classes < 1:
            raise UserError("data.split: a linear probe needs labels and there are none; choose a labelled split")
        if options.stages is None:
            dim = features.width(options.layer, info.stages, info.feature_dim, "method.options.layer")
            heads: dict[str, nn.Module] = {OUTPUT: nn.Linear(dim, info.num_classes)}
        else:
            if options.layer != OUTPUT:
                raise UserError(
                    f"method.options.layer = {quoted(options.layer)}: is of one probe, and stages = {options.stages} "
                    "asks for one on each; leave one of the two out"
                )
            names = _stages(options.stages, info.stages)
            shapes = self._map_shapes(info.view_groups[0][1])
            is_alexnet = info.stages.keys() == ALEXNET_POOLING.keys()
            heads = {
                name: _on_map(shapes[name], info.num_classes, ALEXNET_POOLING[name] if is_alexnet else None)
                for name in names
            }
        self.heads = nn.ModuleDict({name.replace(".", "-"): head for name, head in heads.items()})
        self.names = list(heads)
        for layer in self.heads.modules():
            if isinstance(layer, nn.Linear) and options.init is not None:
                _fill(layer, options.init)

    def _map_shapes(self, size: int) -> dict[str, torch.Size]:
        """[C, h, w] of every stage's map of images of `size` px."""
        mode = self.backbone.training
        self.backbone.eval()
        parameter = next(self.backbone.parameters())
        with torch.no_grad():
            _, maps = self.backbone.forward_stages(parameter.new_zeros(1, self.backbone.in_channels, size, size))
        self.backbone.train(mode)
        return {name: stage_map.shape[1:] for name, stage_map in maps.items()}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.options.batchnorm == "frozen":
            self.backbone.eval()
        return self

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """[N, C] of every probe, at least float32, from images [N, C, S, S]."""
        with torch.no_grad():
            if self.options.stages is None:
                inputs = [features.of_layer(self.backbone, self.options.layer, images)]
            else:
                _, maps = self.backbone.forward_stages(images)
                inputs = [maps[name] for name in self.names]
        heads = zip(self.names, self.heads.values(), inputs, strict=True)
        return {name: at_least_float32(head(x)) for name, head, x in heads}

    def forward(self, batch: Batch, world: World) -> Output:
        """The sum of the probes' cross-entropies. Metrics: the accuracy of each in percent."""
        with self.keyed(batch, batch.view_ids[0]):
            logits = self.logits(batch.views[0][0])
        metrics = {
            "accuracy" if name == OUTPUT else f"accuracy_{name}": accuracy(z_BC, batch.labels, world)
            for name, z_BC in logits.items()
        }
        return Output(reduce(torch.add, (F.cross_entropy(z_BC, batch.labels) for z_BC in logits.values())), metrics)


def _on_map(shape: torch.Size, num_classes: int, pooling: tuple[int, int, int] | None) -> nn.Module:
    """The classifier of a map [N, C, h, w]; pooling: kernel, stride and padding, None: to an even grid of means."""
    channels, height, width = shape
    pool: nn.Module
    if pooling is not None:
        kernel, stride, padding = pooling
        pool = nn.MaxPool2d(kernel, stride, padding)
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    else:
        side = max(1, math.isqrt(MAX_POOLED_VALUES // channels))
        height, width = min(height, side), min(width, side)
        pool = nn.AdaptiveAvgPool2d((height, width))
    norm = nn.BatchNorm2d(channels, affine=False)
    return nn.Sequential(pool, norm, nn.Flatten(), nn.Linear(channels * height * width, num_classes))


def _fill(layer: nn.Linear, init: float | Literal["xavier"]) -> None:
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, 0, init)
    nn.init.zeros_(layer.bias)


def _stages(chosen: list[str] | str, available: dict[str, int]) -> list[str]:
    if not available:
        raise UserError("method.options.stages: this backbone shows no feature maps; set it to null, for its output")
    if chosen == "all":
        return list(available)
    if not chosen or not available.keys() >= set(chosen):
        unknown = next((name for name in chosen if name not in available), "")
        raise UserError(
            f"method.options.stages = {chosen}: the backbone has {', '.join(available)}; "
            f"{did_you_mean(unknown, available)}name some of them, or all"
        )
    return list(dict.fromkeys(chosen))
