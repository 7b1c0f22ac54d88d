"""Detection: torchvision's Faster R-CNN (Ren et al. 2015) on a pre-trained backbone, fine-tuned, counted as VOC counts.

The network of a ResNet is the C4 one of He et al. (2016), which MoCo, VICReg and others publish: proposals and boxes
are read from the map of layer3 (stride 16), and layer4 is the head of each box: every pre-trained layer is used, and no
feature pyramid has to be learned on VOC. Anchors, thresholds and the schedule are those of MoCo (2020, appendix A;
detectron2's Base-RCNN-C4): 24,000 steps of 16 images of VOC2007+2012 trainval, the short side drawn from 480, 512, ...,
800, BatchNorm trained, one more behind layer4, its statistics taken anew over 200 batches after the last step. Losses,
box coder, RoIAlign and the assignment of anchors are torchvision's.

AlexNet has its map of conv5 (stride 16), of which each box is max-pooled to 6 x 6, and the pre-trained fc6 and fc7 as
its head. That is Fast R-CNN's AlexNet (Girshick 2015), by which Krähenbühl et al. (2016) and SeLa measure. They take
the boxes of selective search; here proposals are learned, as in Faster R-CNN. They fold BatchNorm into the
convolutions; here it stays, and norm=frozen keeps what was pre-trained.
"""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_pool

from ssl_dist.backbones.alexnet import AlexNet
from ssl_dist.data.plan import limited
from ssl_dist.errors import UserError, quoted
from ssl_dist.keys import TRANSFER, VIEWS, hash64, uniforms
from ssl_dist.progress import Progress
from ssl_dist.voc import pictures
from ssl_dist.voc.data import CLASSES, Sample, Split, to_tensor
from ssl_dist.voc.loop import Task, read_ahead, seed_torch
from ssl_dist.voc.metrics import IOU_THRESHOLDS, Detections
from ssl_dist.voc.options import DetectionOptions as Options
from ssl_dist.voc.pretrained import Pretrained
from ssl_dist.voc.trunk import AlexNetConv5, Layers, freeze, require_resnet_or_alexnet

PROTOCOL = (
    "{network}, {steps} steps of {batch_size}, lr {lr}, short side {min_sizes} (test {test_size}), BatchNorm "
    "{norm} (statistics of {statistics_steps} batches), {frozen_stages} stages frozen, trained on {train}; VOC's "
    "average precision by 11 points and by area, difficult objects ignored, ap: mean over IoU 0.5 to 0.95, last step, "
    "seed {seed}"
)
VERSION = 1
ANCHOR_SIDES = (32, 64, 128, 256, 512)  # pixels


class RoIMaxPool(MultiScaleRoIAlign):
    """Boxes [n, 4] of every image, in its pixels, to [total, C, 6, 6] of a map {"0": [N, C, h, w]} of stride 16
    (Girshick 2015). A subclass, as FasterRCNN takes no other."""

    def __init__(self) -> None:
        super().__init__(["0"], output_size=6, sampling_ratio=0)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], _image_sizes: list[tuple[int, int]]) -> Tensor:
        return roi_pool(maps["0"], boxes, output_size=6, spatial_scale=1 / 16)


def network(pretrained: Pretrained) -> str:
    """What is trained, for a protocol."""
    if isinstance(pretrained.backbone, AlexNet):
        return "Faster R-CNN on conv5, boxes max-pooled to fc6 and fc7"
    return "Faster R-CNN C4"


def build(pretrained: Pretrained, options: Options) -> tuple[FasterRCNN, list[nn.Module]]:
    """The detector on the backbone's own modules, and those of them that stay in evaluation mode."""
    backbone = require_resnet_or_alexnet(pretrained, "detection")
    frozen = freeze(pretrained, options)
    seed_torch(options.seed)
    width = backbone.feature_dim
    if isinstance(backbone, AlexNet):
        trunk: nn.Module = AlexNetConv5(backbone)
        pooling: nn.Module = RoIMaxPool()
        head = nn.Sequential(nn.Flatten(1), backbone.classifier)
    else:
        trunk, pooling = Layers(backbone, 3), MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0)
        norm = nn.BatchNorm2d(width) if options.norm == "batch" else nn.Identity()
        head = nn.Sequential(backbone.get_submodule("layer4"), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    model = FasterRCNN(
        trunk,
        min_size=options.test_size,
        max_size=options.max_size,
        image_mean=list(pretrained.normalize.mean),
        image_std=list(pretrained.normalize.std),
        rpn_anchor_generator=AnchorGenerator((ANCHOR_SIDES,), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        box_roi_pool=pooling,
        box_head=head,
        box_predictor=FastRCNNPredictor(width, len(CLASSES) + 1),
        box_batch_size_per_image=options.boxes_per_image,
        _skip_resize=True,  # in training only, whose sizes are drawn by keys (as torchvision's own recipes do)
    )
    return model, frozen


def task(pretrained: Pretrained, train: Split, options: Options, device: torch.device) -> Task:
    for sample in train.samples:
        sample.objects()  # a damaged annotation shows now and not during the training
    model, frozen = build(pretrained, options)
    model.to(device)

    def load(epoch: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return augmented(train.samples[index], hash64(options.seed, TRANSFER, VIEWS, epoch, index), options)

    def loss(items: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in items]
        return model([image.to(device) for image, _ in items], targets)

    return Task(model, len(train), load, loss, frozen)


def augmented(sample: Sample, key: np.uint64, options: Options) -> tuple[Tensor, dict[str, Tensor]]:
    """Image float32 [3, h, w] in [0, 1] and its boxes: a short side and a flip are drawn from `key`.

    Difficult objects are learned too, as in detectron2. Raises `UserError` for a box outside the image.
    """
    image, objects = sample.image(), sample.objects()
    size, flip = uniforms(key, 2)
    side = options.min_sizes[int(size * len(options.min_sizes))]
    width, height = image.size
    scale = min(side / min(width, height), options.max_size / max(width, height))
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    boxes = objects.boxes.clip(0, (width, height, width, height))
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if empty.any():
        box = " ".join(f"{c:g}" for c in objects.boxes[empty.argmax()])
        raise UserError(f"{sample.annotation_path}: a box ({box}) lies outside of the image of {width}x{height} pixels")
    boxes = boxes * np.array([new_width / width, new_height / height] * 2, np.float32)
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    if flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes[:, [0, 2]] = new_width - boxes[:, [2, 0]]
    target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(objects.labels + 1)}
    return to_tensor(image), target


def evaluate(model: nn.Module, test: Split, device: torch.device, threads: int) -> tuple[dict[str, float], Figure]:
    """Every image of the test split once, one at a time, at its own proportions. Values in percent, and a picture."""
    model.eval()
    detections, rows, shown = Detections(len(CLASSES)), set(limited(len(test), pictures.MAX_IMAGES)), []

    with Progress(f"detection {test.title}", len(test), "image") as counter, torch.inference_mode():
        for index, [image] in enumerate(read_ahead(Sample.image, zip(test.samples, strict=True), 1, threads)):
            (output,) = model([to_tensor(image).to(device)])
            boxes, labels, scores = (output[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
            objects = test.samples[index].objects()
            detections.add(boxes, labels - 1, scores, objects)
            if index in rows:
                shown.append((image, objects, boxes, labels - 1, scores))
            counter.update(1)
    return summary(detections, test), pictures.boxes(shown)


def summary(detections: Detections, test: Split) -> dict[str, float]:
    """Means over the classes that the split holds: ap50, ap75 and ap (over all thresholds), by 11 points and by area;
    and every class's ap50 by 11 points."""
    ap_TCK = 100 * np.stack([detections.ap(threshold) for threshold in IOU_THRESHOLDS])
    present_C = ~np.isnan(ap_TCK[0, :, 0])
    if not present_C.any():
        raise UserError(
            f"test_split = {quoted(test.name)}: holds no object that is not difficult; choose another split"
        )
    mean_TK = ap_TCK[:, present_C].mean(1)
    values = {}
    for kind, name in enumerate(("11point", "area")):
        values[f"voc_detection_ap50_{name}"] = mean_TK[0, kind]
        values[f"voc_detection_ap75_{name}"] = mean_TK[IOU_THRESHOLDS.index(0.75), kind]
        values[f"voc_detection_ap_{name}"] = mean_TK[:, kind].mean()
    for label in np.flatnonzero(present_C):
        values[f"voc_detection_ap50_{CLASSES[label]}"] = ap_TCK[0, label, 0]
    return values
