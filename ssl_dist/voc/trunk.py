"""A pre-trained backbone as a part of a larger network: which layers train, which keep their statistics, dilation."""

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import nn
from torchvision.models.resnet import Bottleneck

from ssl_dist.backbones.resnet import ResNet
from ssl_dist.errors import UserError, quoted
from ssl_dist.nn.backbone import Backbone
from ssl_dist.voc.loop import TrainingOptions
from ssl_dist.voc.pretrained import Pretrained


class TransferOptions(TrainingOptions):
    norm: Literal["batch", "frozen"] = Field(
        "batch", description="BatchNorm of the backbone: trained on the batch's statistics, or left as pre-trained"
    )
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = Field(
        0, description="0 trains all; 1 keeps the stem, 2 layer1 too, ..."
    )


def require_resnet(pretrained: Pretrained, task: str) -> ResNet:
    """The backbone. Raises `UserError` for one without a ResNet's four layers."""
    if not isinstance(pretrained.backbone, ResNet):
        raise UserError(
            f"backbone.name = {quoted(pretrained.name)}: voc {task} needs a residual network with layer1 to layer4 "
            "(resnet18 to resnet200, wide ones too); voc segmentation and classification take others"
        )
    return pretrained.backbone


def freeze(pretrained: Pretrained, options: TransferOptions) -> list[nn.Module]:
    """Switch off the gradient of what shall not train; returns the modules that stay in evaluation mode."""
    backbone = pretrained.backbone
    frozen: list[nn.Module] = []
    if options.frozen_stages:
        if not isinstance(backbone, ResNet):
            raise UserError(
                f"frozen_stages = {options.frozen_stages}: backbone {pretrained.name} is not one of resnet18 to "
                "resnet200; set it to 0"
            )
        stages = [["conv1", "bn1"], *([f"layer{number}"] for number in (1, 2, 3, 4))]
        frozen += [backbone.get_submodule(name) for stage in stages[: options.frozen_stages] for name in stage]
    if options.norm == "frozen":
        frozen += [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


class Layers(nn.Sequential):
    """The stem and layer1 to layer`last` of a ResNet, by their own names; out_channels: those of its map."""

    def __init__(self, backbone: ResNet, last: int):
        names = ("conv1", "bn1", "relu", "maxpool", *(f"layer{number}" for number in range(1, last + 1)))
        super().__init__(OrderedDict((name, backbone.get_submodule(name)) for name in names))
        self.out_channels: int = backbone.stages[f"layer{last}"]


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
