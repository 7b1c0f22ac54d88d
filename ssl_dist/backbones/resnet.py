"""torchvision's residual networks without their classifier: its tensor names, minus fc, and its initialisation."""

from torch import nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.resnet import BasicBlock, Bottleneck

from ssl_dist.backbones.base import Backbone

LAYERS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(Backbone, torchvision_resnet.ResNet):
    """ResNet-`depth` with the stem for large images; images [N, 3, S, S] -> features [N, 512 or 2048]."""

    def __init__(self, depth: int):
        super().__init__(*LAYERS[depth])
        self.feature_dim = self.fc.in_features
        self.fc = nn.Identity()
        widths = [self.feature_dim >> halvings for halvings in (3, 2, 1, 0)]
        self.stages = {"stem": 64} | {f"layer{i}": width for i, width in enumerate(widths, 1)}

    def steps(self):
        return [
            ("stem", lambda x: self.relu(self.bn1(self.conv1(x)))),
            ("layer1", lambda x: self.layer1(self.maxpool(x))),
            ("layer2", self.layer2),
            ("layer3", self.layer3),
            ("layer4", self.layer4),
        ]
