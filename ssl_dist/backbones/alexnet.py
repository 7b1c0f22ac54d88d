"""SeLa's AlexNet (Asano et al. 2020): that of DeepCluster with BatchNorm and RGB input (no Sobel), big or small.

Tensor names are those of the official code. It takes images of 224 px: its linear layers need a map of 6 x 6.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ssl_dist.backbones.conv4 import initialize
from ssl_dist.nn.backbone import Backbone, Step

# kernel, stride, padding; whether a max-pooling follows
CONVOLUTIONS = ((11, 4, 2, True), (5, 1, 2, True), (3, 1, 1, False), (3, 1, 1, False), (3, 1, 1, True))
BIG = (96, 256, 384, 384, 256)  # their output channels; "big" and "small" are the official code's words
SMALL = (64, 192, 384, 256, 256)
IMAGE_SIZES = range(223, 255)  # px that end in a map of 6 x 6


class Conv2d(nn.Conv2d):
    """A convolution right before a BatchNorm, which removes its bias: the bias gets a gradient of exactly 0.

    Computed through the sums that gradient is rounding noise, which Adam makes as large as the learning rate and
    different for every number of ranks.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        bias = self.bias.detach() + 0 * self.bias if self.training else self.bias
        return self._conv_forward(x, self.weight, bias)


class AlexNet(Backbone):
    """Images [N, C, 224, 224] -> features [N, 4096], what SeLa's heads and its nearest-neighbour evaluation read.

    The maps of the stages are those after the ReLU of each convolution (where SeLa's linear probes sit).
    """

    feature_dim = 4096

    def __init__(self, widths: tuple[int, ...] = BIG, in_channels: int = 3) -> None:
        super().__init__()
        self.stages = {f"conv{number}": channels for number, channels in enumerate(widths, 1)}
        layers: list[nn.Module] = []
        for out_channels, (kernel, stride, padding, pooled) in zip(widths, CONVOLUTIONS, strict=True):
            layers.append(Conv2d(in_channels, out_channels, kernel, stride, padding))
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
            if pooled:
                layers.append(nn.MaxPool2d(3, stride=2))
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True),
            nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
        )  # fmt: skip
        initialize(self)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def steps(self) -> list[Step]:
        layers = self.features
        return [
            ("conv1", lambda x: layers[0:3](_checked(x))),
            ("conv2", layers[3:7]),
            ("conv3", layers[7:11]),
            ("conv4", layers[11:14]),
            ("conv5", layers[14:17]),
        ]

    def pooled(self, last_map: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features[17](last_map), 1))


BACKBONES = {"alexnet": AlexNet, "alexnet_small": partial(AlexNet, SMALL)}


def _checked(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    if height not in IMAGE_SIZES or width not in IMAGE_SIZES:
        raise ValueError(
            f"alexnet takes images of {IMAGE_SIZES[0]} to {IMAGE_SIZES[-1]} px (its linear layers need a map of 6 x "
            f"6), not {height} x {width}"
        )
    return images
