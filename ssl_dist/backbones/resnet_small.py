"""The small residual networks of relational reasoning: ResNet-(6n+2) for 32 px images (He et al. 2016, section 4.2).

Unlike He et al., a shortcut that changes the shape is a 1x1 convolution with BatchNorm. Tensor names are those of
the official code of Patacchiola & Storkey (2020).
"""

from functools import partial

from torch import nn

from ssl_dist.backbones.conv4 import initialize
from ssl_dist.backbones.resnet import BasicBlock, stage
from ssl_dist.nn.backbone import Backbone, Step
from ssl_dist.nn.batchnorm_relu import batchnorm_relu


class SmallResNet(Backbone):
    """Three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels; images [N, C, S, S] -> features [N, 64]."""

    feature_dim = 64

    def __init__(self, depth: int, in_channels: int = 3):
        super().__init__()
        num_blocks, rest = divmod(depth - 2, 6)
        if rest or num_blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 2")
        self.stages = {"stem": 16, "layer1": 16, "layer2": 32, "layer3": 64}
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(BasicBlock, 16, 16, num_blocks, stride=1)
        self.layer2 = stage(BasicBlock, 16, 32, num_blocks, stride=2)
        self.layer3 = stage(BasicBlock, 32, 64, num_blocks, stride=2)
        initialize(self)

    def steps(self) -> list[Step]:
        return [
            ("stem", lambda x: batchnorm_relu(self.bn1, self.conv1(x))),
            ("layer1", self.layer1),
            ("layer2", self.layer2),
            ("layer3", self.layer3),
        ]


BACKBONES = {f"resnet{depth}": partial(SmallResNet, depth) for depth in (8, 20, 32, 56)}
