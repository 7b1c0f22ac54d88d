"""torchvision's residual networks without their classifier: its tensor names, minus fc, and its initialisation."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.resnet import BasicBlock, Bottleneck

LAYERS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(torchvision_resnet.ResNet):
    """ResNet-`depth` with the stem for large images; images [N, 3, S, S] -> features [N, 512 or 2048]."""

    def __init__(self, depth: int):
        super().__init__(*LAYERS[depth])
        self.feature_dim = self.fc.in_features
        self.fc = nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        """The map before the global pooling, [N, D, S/32, S/32]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(self.features(x)), 1)
