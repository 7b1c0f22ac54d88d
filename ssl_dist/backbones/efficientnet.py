"""torchvision's EfficientNets (Tan & Le 2019, 2021) without their classifier: its layers, tensor names and weights.

Their StochasticDepth layers are torchvision's own.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.efficientnet import FusedMBConv, MBConv

from ssl_dist.nn.backbone import Backbone, Step


class EfficientNet(Backbone):
    """The network `name` of torchvision; images [N, C, S, S] -> features [N, 1280].

    The dropout before torchvision's classifier belongs to the classifier and goes with it.
    """

    def __init__(self, name: str, in_channels: int = 3):
        super().__init__()
        network: Any = get_model(name)
        self.features = network.features
        if in_channels != 3:
            stem = network.features[0][0]
            others = nn.Conv2d(in_channels, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False)
            nn.init.kaiming_normal_(others.weight, mode="fan_out")  # as torchvision's own
            network.features[0][0] = others
        self.feature_dim = network.classifier[-1].in_features
        *inner, last = self.features
        names = ["stem", *(f"stage{number}" for number in range(1, len(inner))), "head"]
        widths = [_width(layer) for layer in (*inner, last)]
        self.stages = dict(zip(names, widths, strict=True))
        for bias in _biases_without_effect(self.features):
            bias.register_hook(torch.zeros_like)

    def steps(self) -> list[Step]:
        return list(zip(self.stages, self.features, strict=True))


BACKBONES = {name: partial(EfficientNet, name) for name in ("efficientnet_b0", "efficientnet_v2_s")}


def _biases_without_effect(features: nn.Sequential) -> Iterator[nn.Parameter]:
    """The last bias of a block whose output meets 1x1 convolutions with BatchNorm alone, which removes the shift.

    Its gradient is 0. Computed through the sums it is rounding noise, which Adam makes as large as the learning rate
    and different for every number of ranks. The output of a block with a residual connection carries the shifts of
    the blocks before it on. Its own shift, where stochastic depth drops it for some of the images, is not the same for
    all of them, and has an effect.
    """
    removed = True  # by the head, which is such a convolution
    for block in reversed([m for m in features.modules() if isinstance(m, MBConv | FusedMBConv)]):
        if removed and not (block.use_res_connect and block.stochastic_depth.p):
            yield block.block[-1][1].bias
        removed = block.block[0][0].kernel_size == (1, 1) and (removed or not block.use_res_connect)


def _width(layer: nn.Module) -> int:
    """Channels that leave a layer: those of its last convolution."""
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
