"""Classification by fine-tuning with BatchNorm's statistics left as pre-trained, as DeepCluster's PyTorch code and SeLa
do it (Caron et al. 2018, eval_voc_classif.py).

A linear layer of 20 logits on the backbone's output. Of AlexNet fc6 and fc7 begin anew too (weights from N(0, 0.01),
biases 0.1). Random crops of 10 to 50 percent of the image's area, squares, flipped; 80,000 steps of 16, learning rate
0.003 halved 15 times, gradients clipped to a norm of 10. Lost is the sum over classes of the binary cross entropy,
without those that are only "difficult". An image's scores are the sum of the logits over ten crops. Other than there
each epoch has an order of its own and drops the tail that fills no batch, and BatchNorm's weights do not decay.
"""

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.transforms.functional import resize, ten_crop

from ssl_dist.backbones.alexnet import AlexNet
from ssl_dist.config import Normalize
from ssl_dist.config.recipe import RandomResizedCrop, ViewGroup
from ssl_dist.errors import UserError, first_line, quoted
from ssl_dist.keys import EVALUATION, TRANSFER, VIEWS, hash64
from ssl_dist.progress import Progress
from ssl_dist.views.draw import draw_parameters, numeric_recipe
from ssl_dist.voc.data import CLASSES, Sample, Split, normalized
from ssl_dist.voc.loop import Task, read_ahead, seed_torch
from ssl_dist.voc.metrics import classification_ap
from ssl_dist.voc.options import FinetuneOptions as Options
from ssl_dist.voc.pretrained import Pretrained
from ssl_dist.voc.trunk import keep_statistics

PROTOCOL = (
    "fine-tuned ({trained} layers), BatchNorm's statistics kept, {steps} steps of {batch_size}, lr {lr}, crops of "
    "{size} with scale {scale}, trained on {train}; scores summed over ten {test_crops} crops, VOC's mean average "
    "precision by 11 points and by area, and without interpolation, difficult ones ignored, last step, seed {seed}"
)
VERSION = 1
NUM_CROPS = 10
RESIZE = 256 / 224  # short side before ten fixed crops, in sides of a crop
TEST_BATCH_SIZE = 8  # images, of ten crops each


class Classifier(nn.Module):
    """Images [N, 3, S, S] -> logits [N, 20]."""

    def __init__(self, backbone: nn.Module, feature_dim: int):
        super().__init__()
        self.backbone = backbone
        self.top_layer = nn.Linear(feature_dim, len(CLASSES))
        nn.init.constant_(self.top_layer.bias, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        return self.top_layer(self.backbone(images).flatten(1))


def build(pretrained: Pretrained, options: Options) -> tuple[Classifier, list[nn.Module]]:
    """The network on the backbone's own modules, and those of them that stay in evaluation mode.

    Raises `UserError` for images that do not fit the backbone.
    """
    backbone = pretrained.backbone
    seed_torch(options.seed)
    begun_anew = list(backbone.classifier.modules()) if isinstance(backbone, AlexNet) else []
    for layer in begun_anew:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, 0.1)
    if options.trained == "classifier":
        trained = {id(p) for layer in begun_anew for p in layer.parameters()}
        if options.train_batchnorm:
            norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
            trained |= {id(p) for norm in norms for p in norm.parameters()}
        for parameter in backbone.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, options.size, options.size))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"size = {options.size}: does not fit the backbone: {first_line(error)}") from None
    return Classifier(backbone, backbone.feature_dim), keep_statistics(backbone)


def task(pretrained: Pretrained, train: Split, options: Options, device: torch.device) -> Task:
    labels = train.labels
    model, frozen = build(pretrained, options)
    model.to(device)

    def load(epoch: int, index: int) -> tuple[Tensor, Tensor]:
        key = hash64(options.seed, TRANSFER, VIEWS, epoch, index)
        image = random_crop(train.samples[index].image(), key, options)
        return normalized(image, pretrained.normalize), torch.from_numpy(labels[index])

    def loss(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, targets = (torch.stack(parts).to(device) for parts in zip(*items, strict=True))
        return {"binary_cross_entropy": summed_loss(model(images), targets)}

    return Task(model, len(train), load, loss, frozen)


def summed_loss(logits_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """Binary cross entropy, summed over classes, the mean over images. labels: 1, -1, or 0, which does not count."""
    losses = binary_cross_entropy_with_logits(logits_NC, (labels_NC > 0).to(logits_NC.dtype), reduction="none")
    return (losses * (labels_NC != 0)).sum() / len(logits_NC)


def random_crop(image: Image.Image, key: np.uint64, options: Options) -> Image.Image:
    """The square crop, resized to options.size and at times mirrored, that `key` draws (torchvision's
    RandomResizedCrop with ratio 1)."""
    crop = RandomResizedCrop(scale=options.scale, ratio=(1.0, 1.0))
    recipe = numeric_recipe(ViewGroup(random_resized_crop=crop, horizontal_flip=0.5), options.size)
    drawn = draw_parameters(recipe, key, image.height, image.width)
    top, left, height, width = drawn.crop
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((options.size, options.size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.flip else image


def test_crops(image: Image.Image, index: int, normalize: Normalize, options: Options) -> Tensor:
    """float32 [10, 3, S, S], normalised, of test image number `index`."""
    if options.test_crops == "fixed":
        crops = ten_crop(resize(image, round(RESIZE * options.size)), options.size)
    else:
        keys = (hash64(options.seed, TRANSFER, EVALUATION, index, number) for number in range(NUM_CROPS))
        crops = [random_crop(image, key, options) for key in keys]
    return torch.stack([normalized(crop, normalize) for crop in crops])


def evaluate(
    model: nn.Module, test: Split, normalize: Normalize, options: Options, device: torch.device, threads: int
) -> dict[str, float]:
    """Percent: the means over the classes that the split shows, and every class's average precision by 11 points."""
    model.eval()

    def load(index: int, sample: Sample) -> Tensor:
        return test_crops(sample.image(), index, normalize, options)

    parts = []
    with Progress(f"classification {test.title}", len(test), "image") as counter, torch.inference_mode():
        for crops in read_ahead(load, enumerate(test.samples), TEST_BATCH_SIZE, threads):
            logits = model(torch.cat(crops).to(device))
            parts.append(logits.view(len(crops), NUM_CROPS, len(CLASSES)).sum(1).cpu().numpy())
            counter.update(len(crops))
    return summary(np.concatenate(parts), test.labels)


def check_classes(test: Split) -> None:
    """Raises `UserError` for a split that shows no class."""
    if not (test.labels > 0).any():
        raise UserError(f"test_split = {quoted(test.name)}: no image shows any class; choose another split")


def summary(scores_NC: np.ndarray, labels_NC: np.ndarray) -> dict[str, float]:
    """voc_finetune_map is DeepCluster's: scikit-learn's area without interpolation, equal scores counted against."""
    present = np.flatnonzero((labels_NC > 0).any(0))
    eleven, area, plain = [], [], []
    for label in present:
        scores, labels = scores_NC[:, label], labels_NC[:, label]
        of_label = classification_ap(scores, labels)
        eleven.append(of_label[0])
        area.append(of_label[1])
        counted = labels != 0
        positive = labels[counted] > 0
        plain.append(average_precision_score(positive, scores[counted] - 1e-5 * positive))
    values = {
        "voc_finetune_map": 100 * float(np.mean(plain)),
        "voc_finetune_map_11point": 100 * float(np.mean(eleven)),
        "voc_finetune_map_area": 100 * float(np.mean(area)),
    }
    return values | {f"voc_finetune_ap_{CLASSES[c]}": 100 * ap for c, ap in zip(present, eleven, strict=True)}
