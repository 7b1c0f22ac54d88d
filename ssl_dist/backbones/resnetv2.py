"""The pre-activation ResNet-50 of SeLa (Asano et al. 2020, after He et al. 2016b), with the official tensor names.

Unlike He et al. there is no BatchNorm and no ReLU after the stem and none before the final pooling.
"""

from torch import Tensor, nn

from ssl_dist.nn.backbone import Backbone, Step
from ssl_dist.nn.batchnorm_relu import batchnorm_relu

NUM_BLOCKS = (3, 4, 6, 3)


class Block(nn.Module):
    """BatchNorm, ReLU, convolution, three times; a shortcut that changes the shape starts after the first ReLU."""

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != 4 * planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, 4 * planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activated = batchnorm_relu(self.bn1, x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        x = self.conv2(batchnorm_relu(self.bn2, self.conv1(activated)))
        return self.conv3(batchnorm_relu(self.bn3, x)) + shortcut


class ResNetV2(Backbone):
    """Images [N, C, S, S] -> features [N, 2048]. The maps of the stages are sums, not yet activated."""

    feature_dim = 2048

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        layers = [nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)]
        self.stages = {"stem": 64}
        channels = 64
        for number, num_blocks in enumerate(NUM_BLOCKS):
            planes = 64 << number
            first = Block(channels, planes, stride=1 if number == 0 else 2)
            layers.append(nn.Sequential(first, *(Block(4 * planes, planes, 1) for _ in range(num_blocks - 1))))
            channels = self.stages[f"layer{number + 1}"] = 4 * planes
        self.features = nn.Sequential(*layers)

    def steps(self) -> list[Step]:
        stem, maxpool, layer1, *deeper = self.features
        return [
            ("stem", stem),
            ("layer1", lambda x: layer1(maxpool(x))),
            *((f"layer{number}", layer) for number, layer in enumerate(deeper, 2)),
        ]


BACKBONES = {"resnetv2_50": ResNetV2}
