"""A pre-trained backbone as a part of a larger network: which layers train, which keep their statistics, dilation."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models.resnet import Bottleneck

from ssl_dist.backbones import alexnet
from ssl_dist.backbones.alexnet import AlexNet
from ssl_dist.backbones.resnet import ResNet
from ssl_dist.errors import UserError, quoted
from ssl_dist.nn.backbone import Backbone
from ssl_dist.voc.options import TransferOptions
from ssl_dist.voc.pretrained import Pretrained


def require_resnet_or_alexnet(pretrained: Pretrained, task: str) -> ResNet | AlexNet:
    """The backbone. Raises `UserError` for one that is neither."""
    if not isinstance(pretrained.backbone, ResNet | AlexNet):
        raise UserError(
            f"backbone.name = {quoted(pretrained.name)}: voc {task} needs a residual network with layer1 to layer4 "
            "(resnet18 to resnet200, wide ones too) or alexnet; voc segmentation, classification and finetune take "
            "others"
        )
    return pretrained.backbone


def freeze(pretrained: Pretrained, options: TransferOptions) -> list[nn.Module]:
    """Switch off the gradient of what shall not train; returns the modules that stay in evaluation mode."""
    backbone = pretrained.backbone
    frozen: list[nn.Module] = []
    if options.frozen_stages:
        for stage in _stages(pretrained, options.frozen_stages):
            frozen += stage
    if options.norm == "frozen":
        frozen += [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in frozen:
        module.requires_grad_(False)
    return frozen + (keep_statistics(backbone) if options.norm == "frozen" else [])


def _stages(pretrained: Pretrained, count: int) -> list[list[nn.Module]]:
    """The modules of the first `count` of five stages."""
    backbone = pretrained.backbone
    if isinstance(backbone, AlexNet):
        starts = [n for n, layer in enumerate(backbone.features) if isinstance(layer, alexnet.Conv2d)]
        return [[backbone.features[start], backbone.features[start + 1]] for start in starts[:count]]
    if not isinstance(backbone, ResNet):
        raise UserError(
            f"frozen_stages = {count}: backbone {pretrained.name} is not one of resnet18 to resnet200, nor alexnet; "
            "set it to 0"
        )
    names = [["conv1", "bn1"], *([f"layer{number}"] for number in (1, 2, 3, 4))]
    return [[backbone.get_submodule(name) for name in stage] for stage in names[:count]]


def keep_statistics(backbone: Backbone) -> list[nn.Module]:
    """The modules that must stay in evaluation mode for BatchNorm's statistics to stay: AlexNet's convolutions too,
    whose biases train only where no statistics of the batch remove them."""
    kinds = (nn.BatchNorm2d, alexnet.Conv2d)
    return [module for module in backbone.modules() if isinstance(module, kinds)]


class Layers(nn.Sequential):
    """The stem and layer1 to layer`last` of a ResNet, by their own names; out_channels: those of its map."""

    def __init__(self, backbone: ResNet, last: int):
        stem = {
            "conv1": backbone.conv1,
            "bn1": backbone.bn1,
            "relu": nn.ReLU(inplace=True),
            "maxpool": backbone.maxpool,
        }
        layers = {f"layer{number}": backbone.get_submodule(f"layer{number}") for number in range(1, last + 1)}
        super().__init__(OrderedDict(stem | layers))
        self.out_channels: int = backbone.stages[f"layer{last}"]


class AlexNetConv5(nn.Module):
    """Images [N, 3, H, W], sides multiples of 16, to the map of conv5 [N, 256, H / 16, W / 16], before its pooling.

    The image is padded by 15 zeros (the mean colour) at the left and upper edge, so that cell i looks at pixel 16 i, as
    proposals and RoI pooling take it; Fast R-CNN's AlexNet pads its convolutions for that (Girshick 2015).
    """

    def __init__(self, backbone: AlexNet):
        super().__init__()
        self.features = backbone.features[:-1]
        self.out_channels: int = backbone.stages["conv5"]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(pad(images, (15, 0, 15, 0)))


class AlexNetFC7(nn.Module):
    """Images [N, 3, H, W] to {"out": [N, 4096, h, w]}, h = ceil(H / 32): fc6 and fc7 as convolutions, from the
    pre-trained linear layers (Long et al. 2015).

    Cell i looks at pixel 32 i + 15, half a cell from its left edge, as an upsampling by 32 takes it: the image is
    padded to multiples of 32 px at the right and lower edge only, its map by 3 cells on every side before the 6 x 6 of
    fc6.
    """

    stride = 32

    def __init__(self, backbone: AlexNet):
        super().__init__()
        self.features = backbone.features
        channels = backbone.stages["conv5"]
        layers: list[nn.Module] = []
        for layer in backbone.classifier:
            if isinstance(layer, nn.Linear):
                side, padding = (6, 3) if layer.in_features == 36 * channels else (1, 0)
                width = layer.in_features // side**2
                convolution = nn.Conv2d(width, layer.out_features, side, padding=padding)
                convolution.weight.data = layer.weight.data.view(-1, width, side, side)
                convolution.bias = layer.bias
                layers.append(convolution)
            else:
                layers.append(layer)
        self.classifier = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = (max(64, -side % self.stride + side) for side in images.shape[-2:])
        padded = pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        return {"out": self.classifier(self.features(padded))}


def dilate_last(backbone: Backbone) -> None:
    """Give layer4 of a ResNet stride 1 and, behind its first block, dilation 2, where blocks are bottlenecks:
    torchvision's replace_stride_with_dilation=[False, False, True], which has none for basic blocks."""
    if not isinstance(backbone, ResNet):
        return
    for number, block in enumerate(backbone.get_submodule("layer4").children()):
        if isinstance(block, Bottleneck) and number == 0:
            block.conv2.stride = block.downsample[0].stride = (1, 1)
        elif isinstance(block, Bottleneck):
            block.conv2.dilation = block.conv2.padding = (2, 2)
