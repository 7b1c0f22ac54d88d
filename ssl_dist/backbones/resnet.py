"""Residual networks (He et al. 2016) without their classifier: torchvision's blocks, tensor names and initialisation.

SFRIK, VICReg, relational reasoning's resnet34, ReLIC and SeLa's ResNetV1 all compute what these do.
"""

from functools import partial

from torch import Tensor, nn
from torchvision.models import resnet

from ssl_dist.backbones.conv4 import initialize
from ssl_dist.nn.backbone import Backbone, Step
from ssl_dist.nn.batchnorm_relu import batchnorm_relu


class BasicBlock(resnet.BasicBlock):
    """torchvision's, with each BatchNorm and what follows as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = batchnorm_relu(self.bn1, self.conv1(x))
        return batchnorm_relu(self.bn2, self.conv2(y), shortcut)


class Bottleneck(resnet.Bottleneck):
    """torchvision's, with each BatchNorm and what follows as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = batchnorm_relu(self.bn1, self.conv1(x))
        y = batchnorm_relu(self.bn2, self.conv2(y))
        return batchnorm_relu(self.bn3, self.conv3(y), shortcut)


LAYERS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}


class ResNet(Backbone):
    """ResNet-`depth`; images [N, C, S, S] -> features [N, D], D = 512 or 2048 times `width`.

    width: factor of all channels, those of the stem too (as SFRIK and VICReg do; torchvision's wide networks widen
    less). small_stem: a 3x3 convolution of stride 1 and no max-pooling, for images of 32 px (ReLIC, SimCLR).
    zero_init_residual: every block begins as the identity, as its last BatchNorm's weight is 0 (SFRIK, VICReg).
    """

    def __init__(
        self,
        depth: int,
        width: int = 1,
        small_stem: bool = False,
        zero_init_residual: bool = False,
        in_channels: int = 3,
    ):
        super().__init__()
        block, numbers = LAYERS[depth]
        channels = 64 * width
        if small_stem:
            self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = {"stem": channels}
        layers = []
        for number, num_blocks in enumerate(numbers):
            planes = 64 * width << number
            layers.append(stage(block, channels, planes, num_blocks, stride=1 if number == 0 else 2))
            channels = self.stages[f"layer{number + 1}"] = planes * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.feature_dim = channels
        initialize(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, block):
                    nn.init.zeros_((module.bn3 if block is Bottleneck else module.bn2).weight)

    def steps(self) -> list[Step]:
        return [
            ("stem", lambda x: batchnorm_relu(self.bn1, self.conv1(x))),
            ("layer1", lambda x: self.layer1(self.maxpool(x))),
            ("layer2", self.layer2),
            ("layer3", self.layer3),
            ("layer4", self.layer4),
        ]


_PLAIN = {f"resnet{depth}": partial(ResNet, depth) for depth in LAYERS}
_WIDE = {f"resnet{depth}x{width}": partial(ResNet, depth, width) for depth in LAYERS for width in (2, 4, 5)}
BACKBONES = _PLAIN | _WIDE
BACKBONES |= {f"{name}_small_stem": partial(builder, small_stem=True) for name, builder in BACKBONES.items()}


def stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, planes: int, num_blocks: int, stride: int
) -> nn.Sequential:
    """`num_blocks` blocks, the first of which changes the number of channels and has the stride."""
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    first = block(in_channels, planes, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, planes) for _ in range(num_blocks - 1)))
