"""torchvision's EfficientNets (Tan & Le 2019, 2021) without their classifier: its layers, tensor names and weights.

Their StochasticDepth layers are torchvision's own.
"""

from torch import nn
from torchvision.models import efficientnet

from ssl_dist.backbones.base import Backbone

BUILDERS = {
    "efficientnet_b0": efficientnet.efficientnet_b0,
    "efficientnet_v2_s": efficientnet.efficientnet_v2_s,
}


class EfficientNet(Backbone):
    """The network `name` of torchvision; images [N, 3, S, S] -> features [N, 1280].

    The dropout before torchvision's classifier belongs to the classifier and goes with it.
    """

    def __init__(self, name: str):
        super().__init__()
        network = BUILDERS[name]()
        self.features = network.features
        self.feature_dim = network.classifier[-1].in_features
        *inner, last = self.features
        names = ["stem", *(f"stage{number}" for number in range(1, len(inner))), "head"]
        widths = [_width(layer) for layer in (*inner, last)]
        self.stages = dict(zip(names, widths, strict=True))

    def steps(self):
        return list(zip(self.stages, self.features, strict=True))


def _width(layer: nn.Module) -> int:
    """Channels that leave a layer: those of its last convolution."""
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
