"""The small residual networks of relational reasoning: ResNet-(6n+2) for 32 px images (He et al. 2016, section 4.2).

Unlike He et al., a shortcut that changes the shape is a 1x1 convolution with BatchNorm. Tensor names are those of
the official code of Patacchiola & Storkey (2020).
"""

from torch import Tensor, nn

from ssl_dist.backbones.conv4 import initialize
from ssl_dist.nn.backbone import Backbone, Step

DEPTHS = (8, 20, 32, 56)


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class SmallResNet(Backbone):
    """Three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels; images [N, 3, S, S] -> features [N, 64]."""

    feature_dim = 64

    def __init__(self, depth: int):
        super().__init__()
        num_blocks, rest = divmod(depth - 2, 6)
        if rest or num_blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 2")
        self.stages = {"stem": 16, "layer1": 16, "layer2": 32, "layer3": 64}
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, num_blocks, stride=1)
        self.layer2 = _stage(16, 32, num_blocks, stride=2)
        self.layer3 = _stage(32, 64, num_blocks, stride=2)
        initialize(self)

    def steps(self) -> list[Step]:
        return [
            ("stem", lambda x: self.relu(self.bn1(self.conv1(x)))),
            ("layer1", self.layer1),
            ("layer2", self.layer2),
            ("layer3", self.layer3),
        ]


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))
