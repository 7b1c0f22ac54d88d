"""The shallow network of relational reasoning (Patacchiola & Storkey 2020, appendix A): four convolutions."""

from torch import Tensor, nn

from ssl_dist.nn.backbone import Backbone, Step
from ssl_dist.nn.batchnorm_relu import batchnorm_relu

WIDTHS = (8, 16, 32, 64)


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, pooled: bool = False) -> Tensor:
        return batchnorm_relu(self.bn, self.conv(x), pooled=pooled)


class Conv4(Backbone):
    """Four blocks of convolution, BatchNorm and ReLU; the side is halved after each of the first three.

    Images [N, C, S, S], S >= 8 -> features [N, 64].
    """

    feature_dim = WIDTHS[-1]

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stages = {f"layer{i}": width for i, width in enumerate(WIDTHS, 1)}
        self.layer1 = Block(in_channels, WIDTHS[0])
        self.layer2 = Block(WIDTHS[0], WIDTHS[1])
        self.layer3 = Block(WIDTHS[1], WIDTHS[2])
        self.layer4 = Block(WIDTHS[2], WIDTHS[3])
        self.pool = nn.AvgPool2d(2)
        initialize(self)

    def steps(self) -> list[Step]:
        return [
            ("layer1", self.layer1),
            ("layer2", lambda x: self.layer2(self.pool(x))),
            ("layer3", lambda x: self.layer3(self.pool(x))),
            ("layer4", lambda x: self.layer4(self.pool(x))),
        ]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x, True)  # nothing has the maps as they are before the pooling, unlike in `steps`
        return self.pooled(self.layer4(x))


BACKBONES = {"conv4": Conv4}


def initialize(module: nn.Module) -> None:
    """Convolutions from N(0, 2 / (k * k * out_channels)) (He et al. 2015), BatchNorm 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
