"""Segmentation: torchvision's fully convolutional network (Long et al. 2015) on a pre-trained backbone, fine-tuned.

The head is torchvision's FCNHead on the last map. Bottleneck ResNets keep layer4 at stride 16 by dilation, as MoCo
does; torchvision dilates no basic blocks, so resnet18 and 34 stay at stride 32. AlexNet becomes FCN-32s instead, with
fc6 and fc7 as convolutions, as the Colorization paper (Zhang et al. 2016) and SeLa measure it. The schedule and the
augmentation are MoCo's (He et al. 2020, appendix A): 30,000 steps of 16 crops of 513 px, scaled by 0.5 to 2, flipped,
learning rate 0.003 with falls at 70 and 90 percent. Whole test images at their own size, mean intersection over union,
void pixels left out.
"""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models.segmentation.fcn import FCN, FCNHead

from ssl_dist.backbones.alexnet import AlexNet
from ssl_dist.config import Normalize
from ssl_dist.data.plan import limited
from ssl_dist.errors import UserError, first_line, quoted
from ssl_dist.keys import TRANSFER, VIEWS, hash64, uniforms
from ssl_dist.nn.backbone import Backbone
from ssl_dist.progress import Progress
from ssl_dist.voc import pictures
from ssl_dist.voc.data import CLASSES, VOID, Sample, Split, normalized
from ssl_dist.voc.loop import Task, read_ahead, seed_torch
from ssl_dist.voc.metrics import class_iou, confusion
from ssl_dist.voc.options import SegmentationOptions as Options
from ssl_dist.voc.pretrained import Pretrained
from ssl_dist.voc.trunk import AlexNetFC7, dilate_last, freeze

PROTOCOL = (
    "{network}, {steps} steps of {batch_size}, lr {lr}, crops of {crop}, BatchNorm {norm}, "
    "{frozen_stages} stages frozen, trained on {train}; mean IoU over the classes, whole images, void ignored, "
    "last step, seed {seed}"
)
VERSION = 1
NAMES = ("background", *CLASSES)
SCALES = (0.5, 2.0)


class Trunk(nn.Module):
    """Images to {"out": the last map}, the form that torchvision's segmentation networks take."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.body = backbone

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for _, step in self.body.steps():
            x = step(x)
        return {"out": x}


class FCN32s(nn.Module):
    """AlexNet's fc7 at every 32nd pixel, 21 scores of it (beginning at 0), and those upsampled by 32: images
    [N, 3, H, W] -> {"out": [N, 21, H, W]}."""

    def __init__(self, backbone: AlexNet):
        super().__init__()
        self.backbone = AlexNetFC7(backbone)
        self.classifier = nn.Conv2d(backbone.feature_dim, len(NAMES), 1)
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        scores = self.classifier(self.backbone(images)["out"])
        scores = interpolate(scores, scale_factor=self.backbone.stride, mode="bilinear", align_corners=False)
        return {"out": scores[..., :height, :width]}


def build(pretrained: Pretrained, options: Options) -> tuple[nn.Module, list[nn.Module], int]:
    """The network on the backbone's own modules, those of them that stay in evaluation mode, and the map's stride.

    Raises `UserError` for a backbone without a map of images of any size.
    """
    backbone = pretrained.backbone
    if isinstance(backbone, AlexNet):
        frozen = freeze(pretrained, options)
        return FCN32s(backbone), frozen, AlexNetFC7.stride
    dilate_last(backbone)
    frozen = freeze(pretrained, options)
    trunk, (height, width) = Trunk(backbone), (192, 256)
    try:
        with torch.no_grad():
            last_map = trunk.eval()(torch.zeros(1, 3, height, width))["out"]
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"backbone.name = {quoted(pretrained.name)}: voc segmentation needs maps of images of any size: "
            f"{first_line(error)}; choose another backbone"
        ) from None
    seed_torch(options.seed)
    return FCN(trunk, FCNHead(last_map.shape[1], len(NAMES))), frozen, width // last_map.shape[3]


def network(pretrained: Pretrained, stride: int) -> str:
    """What is trained, for a protocol."""
    return "AlexNet as FCN-32s" if isinstance(pretrained.backbone, AlexNet) else f"FCN head at stride {stride}"


def task(pretrained: Pretrained, train: Split, options: Options, device: torch.device) -> tuple[Task, int]:
    """What is trained, and the map's stride."""
    model, frozen, stride = build(pretrained, options)
    model.to(device)

    def load(epoch: int, index: int) -> tuple[Tensor, Tensor]:
        key = hash64(options.seed, TRANSFER, VIEWS, epoch, index)
        return augmented(train.samples[index], key, options.crop, pretrained.normalize)

    def loss(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, masks = (torch.stack(parts).to(device) for parts in zip(*items, strict=True))
        return {"cross_entropy": mean_loss(model(images)["out"], masks)}

    return Task(model, len(train), load, loss, frozen), stride


def mean_loss(logits_NCHW: Tensor, masks_NHW: Tensor) -> Tensor:
    """Mean cross entropy of the pixels that are not void; 0 where all of them are."""
    total = cross_entropy(logits_NCHW, masks_NHW, ignore_index=VOID, reduction="sum")
    return total / (masks_NHW != VOID).sum().clamp(min=1)


def augmented(sample: Sample, key: np.uint64, crop: int, normalize: Normalize) -> tuple[Tensor, Tensor]:
    """Crop float32 [3, crop, crop], normalised, and class indices int64 [crop, crop]: scale, place and flip are drawn
    from `key`. Beyond the image are zeros (the mean colour), and void."""
    image = sample.image()
    mask = sample.mask(image.size)
    scale, left, upper, flip = uniforms(key, 4)
    factor = SCALES[0] + scale * (SCALES[1] - SCALES[0])
    size = tuple(max(1, round(side * factor)) for side in image.size)
    pixels = normalized(image.resize(size, Image.Resampling.BILINEAR), normalize)
    indices = torch.from_numpy(np.array(mask.resize(size, Image.Resampling.NEAREST))).long()
    if flip < 0.5:
        pixels, indices = pixels.flip(2), indices.flip(1)
    x, y = (int(share * (max(side - crop, 0) + 1)) for share, side in zip((left, upper), size, strict=True))
    pixels, indices = pixels[:, y : y + crop, x : x + crop], indices[y : y + crop, x : x + crop]
    height, width = indices.shape
    padding = (0, crop - width, 0, crop - height)
    return nn.functional.pad(pixels, padding), nn.functional.pad(indices, padding, value=VOID)


def evaluate(
    model: nn.Module, test: Split, normalize: Normalize, device: torch.device, threads: int
) -> tuple[dict[str, float], Figure]:
    """Every image of the test split once, whole: values in percent, means over the classes that occur; a picture."""
    model.eval()
    total = np.zeros((len(NAMES), len(NAMES)), np.int64)
    rows, shown = set(limited(len(test), pictures.MAX_IMAGES)), []

    def load(sample: Sample) -> tuple[Image.Image, np.ndarray]:
        image = sample.image()
        return image, np.array(sample.mask(image.size))

    with Progress(f"segmentation {test.title}", len(test), "image") as counter, torch.inference_mode():
        for index, [(image, mask)] in enumerate(read_ahead(load, zip(test.samples, strict=True), 1, threads)):
            pixels = normalized(image, normalize)[None].to(device)
            predicted = model(pixels)["out"][0].argmax(0).cpu().numpy()
            total += confusion(predicted, mask, len(NAMES))
            if index in rows:
                shown.append((image, mask, predicted))
            counter.update(1)
    return summary(total), pictures.masks(shown, NAMES)


def summary(total_CC: np.ndarray) -> dict[str, float]:
    """Mean IoU, accuracy over pixels, and the IoU of every class that occurs."""
    iou_C = 100 * class_iou(total_CC)
    values = {
        "voc_segmentation_miou": float(np.nanmean(iou_C)),
        "voc_segmentation_pixel_accuracy": 100 * total_CC.trace() / max(1, total_CC.sum()),
    }
    return values | {
        f"voc_segmentation_iou_{name}": value for name, value in zip(NAMES, iou_C, strict=True) if value == value
    }
