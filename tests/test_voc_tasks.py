"""Detection and segmentation on small folders in VOC's format: models, augmentation, training and scores."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ssl_dist import backbones, cli
from ssl_dist.backbones import resnet
from ssl_dist.backbones.alexnet import AlexNet, Conv2d
from ssl_dist.backbones.resnet import ResNet
from ssl_dist.config import Normalize
from ssl_dist.data.plan import limited
from ssl_dist.errors import UserError
from ssl_dist.keys import hash64
from ssl_dist.storage import checkpoint
from ssl_dist.voc import detection, loop, pictures, segmentation, trunk
from ssl_dist.voc.data import CLASSES, VOID, read_split, to_tensor
from ssl_dist.voc.metrics import Detections, confusion
from ssl_dist.voc.pretrained import Pretrained
from tests import golden_fill
from tests.make_voc import annotation, voc_folder

CPU = torch.device("cpu")
HALF = Normalize(mean=(0.5, 0.4, 0.3), std=(0.25, 0.25, 0.5))
SMALL = {"min_sizes": [48, 64], "test_size": 64, "boxes_per_image": 16, "batch_size": 2, "steps": 4}


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("data") / "VOC2007", (("train", 12), ("val", 4)))


class Slim(ResNet):
    """A resnet18 with a quarter of the channels: a head of many boxes costs seconds on a CPU."""

    def __init__(self):
        super().__init__(18)
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 16, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(16)
        self.stages, channels = {"stem": 16}, 16
        for number, planes in enumerate((16, 32, 64, 128), 1):
            layer = resnet.stage(resnet.BasicBlock, channels, planes, 2, 1 if number == 1 else 2)
            self.add_module(f"layer{number}", layer)
            channels = self.stages[f"layer{number}"] = planes
        self.feature_dim = channels


def pretrained(name="slim", filled=True):
    torch.manual_seed(0)
    backbone = Slim() if name == "slim" else backbones.build(name)
    if filled:
        golden_fill.fill(backbone, 4)
    return Pretrained(backbone.eval(), name, "toy", HALF, "ab" * 32, 0, None)


def slim_alexnet():
    """AlexNet with few channels and neurons."""
    torch.manual_seed(0)
    backbone = AlexNet((8, 12, 8, 8, 16))
    fully = torch.nn.Linear(36 * 16, 24), torch.nn.ReLU(inplace=True), torch.nn.Dropout(), torch.nn.Linear(24, 24)
    backbone.classifier = torch.nn.Sequential(torch.nn.Dropout(), *fully, torch.nn.ReLU(inplace=True))
    backbone.feature_dim = 24
    golden_fill.fill(backbone, 4)
    return Pretrained(backbone.eval(), "alexnet", "toy", HALF, "ab" * 32, 0, None)


def split(voc, name="train", kind="Main"):
    return read_split([voc], kind, name)


# --------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_the_detector_has_the_backbones_weights_and_one_step_changes_only_what_trains(voc, norm):
    source = pretrained()
    before = {name: tensor.clone() for name, tensor in source.backbone.state_dict().items()}
    options = detection.Options(**SMALL, norm=norm, frozen_stages=2)
    task = detection.task(source, split(voc), options, CPU)
    for name, tensor in before.items():
        part = "roi_heads.box_head.0." if name.startswith("layer4.") else "backbone."
        assert torch.equal(task.model.state_dict()[part + name.removeprefix("layer4.")], tensor), name
    task.train_mode()
    optimizer = loop._optimizer(task.model, options)
    sum(task.loss([task.load(0, 0), task.load(0, 1)]).values()).backward()
    optimizer.step()
    for name, tensor in source.backbone.state_dict().items():
        stays = name.startswith(("conv1", "bn1", "layer1."))
        if norm == "frozen":
            stays |= any(part.startswith(("bn", "running", "num_")) for part in name.split(".")) or "sample.1" in name
        assert torch.equal(tensor, before[name]) == stays, name


def test_batchnorm_does_not_decay(voc):
    task = detection.task(pretrained(), split(voc), detection.Options(**SMALL), CPU)
    weights, norms = loop._optimizer(task.model, detection.Options(**SMALL)).param_groups
    assert (weights["weight_decay"], norms["weight_decay"]) == (1e-4, 0)
    assert all(p.ndim == 1 for p in norms["params"])
    assert len(norms["params"]) == 2 * (20 + 1), "20 of resnet18 and the one after layer4"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_dilated_network_is_torchvisions(name):
    source = pretrained(name)
    state = source.backbone.state_dict()
    model, _, stride = segmentation.build(source, segmentation.Options())
    bottleneck = name == "resnet50"
    reference = getattr(torchvision.models, name)(replace_stride_with_dilation=[False, False, bottleneck])
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(state)
    getter = torchvision.models._utils.IntermediateLayerGetter(reference.eval(), {"layer4": "out"})
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, expected = model.eval().backbone(images)["out"], getter(images)["out"]
        torch.testing.assert_close(output, expected)
        assert model(images)["out"].shape == (1, 21, 64, 96)
    assert stride == (16 if bottleneck else 32) and output.shape[-2:] == (64 // stride, 96 // stride)


@pytest.mark.parametrize(
    ("name", "stride", "channels"), [("conv4", 8, 64), ("resnet8", 4, 64), ("resnet18_small_stem", 8, 512)]
)
def test_segmentation_takes_other_backbones(name, stride, channels):
    source = pretrained(name)
    model, frozen, actual_stride = segmentation.build(source, segmentation.Options(norm="frozen"))
    assert actual_stride == stride and model.classifier[0].in_channels == channels
    assert model.backbone.body is source.backbone and all(isinstance(m, torch.nn.BatchNorm2d) for m in frozen)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = source.backbone.pooled(model.backbone(images)["out"])
        torch.testing.assert_close(pooled, source.backbone(images))


def test_backbones_that_are_refused():
    with pytest.raises(UserError, match="'conv4': voc detection needs a residual network"):
        detection.build(pretrained("conv4"), detection.Options())
    with pytest.raises(UserError, match="voc segmentation needs maps of images of any size: "):
        segmentation.build(pretrained("timm/vit_tiny_patch16_224", filled=False), segmentation.Options())
    with pytest.raises(UserError, match="frozen_stages = 1: backbone conv4 is not one of resnet18"):
        segmentation.build(pretrained("conv4"), segmentation.Options(frozen_stages=1))


def seen(network, position, side):
    """The cells of a map's column that see the pixel (position, position) of an image."""
    images = torch.zeros(1, 3, side, side)
    images[..., position, position] = torch.nan
    with torch.no_grad():
        column = network(images)[0].isnan().any(0).any(0)
    return np.flatnonzero(column)


def test_alexnets_cells_look_where_boxes_and_upsampling_take_them():
    """RoI pooling and anchors take cell i of conv5 at pixel 16 i, the upsampling cell i of fc7 at 32 i + 15.5."""
    backbone = slim_alexnet().backbone
    conv5 = trunk.AlexNetConv5(backbone).eval()
    assert conv5(torch.zeros(1, 3, 64, 96)).shape == (1, 16, 4, 6)
    cells = seen(conv5, 16 * 12, 480)
    assert cells.mean() == 12 and len(cells) == 11, "its receptive field has 163 pixels"
    fc7 = trunk.AlexNetFC7(backbone).eval()
    wide = seen(lambda images: fc7(images)["out"], 32 * 10 + 15, 640)
    assert wide.mean() == 10 and len(wide) == 11, "355 pixels"


def test_fc6_and_fc7_as_convolutions_are_the_pretrained_layers():
    source = slim_alexnet()
    network = trunk.AlexNetFC7(source.backbone).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells = network(images)["out"]  # 7 x 7; the cell in the middle has all 6 x 6 of the map below it
        torch.testing.assert_close(cells[:, :, 3, 3], source.backbone(images))
    model, frozen, stride = segmentation.build(source, segmentation.Options(norm="frozen", frozen_stages=1))
    assert stride == 32 and model.eval()(torch.zeros(1, 3, 70, 45))["out"].shape == (1, 21, 70, 45)
    assert not model.backbone.features[0].weight.requires_grad and model.backbone.features[4].weight.requires_grad
    assert {type(m) for m in frozen} == {torch.nn.BatchNorm2d, Conv2d}


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_a_step_trains_all_of_alexnet(voc, tmp_path, kind):
    source = slim_alexnet()
    if kind == "detection":
        options = detection.Options(**SMALL | {"steps": 2}, lr=1e-2, weight_decay=0)
        task = detection.task(source, split(voc), options, CPU)
        network = detection.network(source)
    else:
        options = segmentation.Options(batch_size=2, steps=4, crop=64, lr=0.05, weight_decay=0)
        task, stride = segmentation.task(source, split(voc, kind="Segmentation"), options, CPU)
        network = segmentation.network(source, stride)
    assert "AlexNet" in network or "conv5" in network
    before = {name: tensor.clone() for name, tensor in task.model.named_parameters()}
    assert torch.equal(before["backbone.features.4.weight"], source.backbone.features[4].weight)
    assert fit(task, options, tmp_path) == 0
    biases = {f"backbone.features.{n}.bias" for n in (0, 4, 8, 11, 14)}  # BatchNorm removes them
    assert {name for name, p in task.model.named_parameters() if torch.equal(p, before[name])} == biases
    if kind == "detection":
        values, _ = detection.evaluate(task.model, split(voc, "val"), CPU, threads=2)
        assert 0 <= values["voc_detection_ap50_area"] <= 100
    else:
        values, _ = segmentation.evaluate(task.model, split(voc, "val", "Segmentation"), HALF, CPU, threads=2)
        assert 0 <= values["voc_segmentation_miou"] <= 100


def test_boxes_are_max_pooled_to_6_by_6():
    cells = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[32.0, 16.0, 32.0 + 16 * 12 - 16, 16.0 + 16 * 6 - 16]])  # 12 columns, 6 rows of cells
    pooled = detection.RoIMaxPool()({"0": cells}, [box], [(320, 320)])
    expected = [[cells[0, :, 1 + y, 2 + 2 * x : 4 + 2 * x].max(1).values for x in range(6)] for y in range(6)]
    torch.testing.assert_close(pooled[0], torch.stack([torch.stack(row, 1) for row in expected], 1))


def test_options_that_are_refused():
    for change in ({"frozen_stages": 6}, {"min_sizes": []}, {"milestones": [2.0]}, {"norm": "sync"}):
        with pytest.raises(ValueError):
            detection.Options(**change)


# ------------------------------------------------------------------------------------------------ augmentation


def test_detection_crops_follow_their_boxes(voc):
    """The pixels in a box keep their colour through size and flip, and the key alone decides."""
    train, options = split(voc), detection.Options(**SMALL)
    sides, flips = set(), set()
    for number in range(24):
        sample = train.samples[number % len(train)]
        image, target = detection.augmented(sample, hash64(number), options)
        again, target_again = detection.augmented(sample, hash64(number), options)
        assert torch.equal(image, again) and torch.equal(target["boxes"], target_again["boxes"])
        sides.add(min(image.shape[1:]))
        original = sample.objects()
        flips.add(bool(abs(target["boxes"][0, 0] * sample.image().width / image.shape[2] - original.boxes[0, 0]) > 1))
        assert target["labels"].tolist() == (original.labels + 1).tolist()
        source = np.array(sample.image())
        for (x0, y0, x1, y1), (a, b, c, d) in zip(target["boxes"].tolist(), original.boxes.tolist(), strict=True):
            ours = image[:, int((y0 + y1) / 2), int((x0 + x1) / 2)] * 255
            assert (ours - torch.tensor(source[int((b + d) / 2), int((a + c) / 2)])).abs().max() < 25
            assert (x1 - x0) / image.shape[2] == pytest.approx((c - a) / source.shape[1], abs=1e-5)
            assert (y1 - y0) / image.shape[1] == pytest.approx((d - b) / source.shape[0], abs=1e-5)
    assert sides == {48, 64} and flips == {False, True}


def test_the_longest_side_is_kept(voc):
    options = detection.Options(**SMALL | {"min_sizes": [64]}, max_size=70)
    image, _ = detection.augmented(split(voc).samples[0], hash64(1), options)
    assert max(image.shape[1:]) == 70


def test_a_box_outside_of_its_image_is_refused(tmp_path):
    root = voc_folder(tmp_path / "VOC2007", (("train", 1),))
    sample = split(root).samples[0]
    width, height = sample.image().size
    sample.annotation_path.write_text(annotation([("bird", (width + 5, 1, width + 9, 9), False)], width, height))
    with pytest.raises(UserError, match=r"lies outside of the image") as caught:
        detection.augmented(sample, hash64(1), detection.Options(**SMALL))
    assert str(sample.annotation_path) in str(caught.value)


def test_segmentation_crops_keep_mask_and_image_together(voc):
    """Where the mask has a class the pixels have its colour; beyond the image are zeros and void."""
    train = split(voc, kind="Segmentation")
    padded = set()
    for number in range(24):
        sample = train.samples[number % len(train)]
        image, mask = segmentation.augmented(sample, hash64(number), 64, HALF)
        again = segmentation.augmented(sample, hash64(number), 64, HALF)
        assert torch.equal(image, again[0]) and torch.equal(mask, again[1])
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32 and mask.dtype == torch.int64
        outside = (image == 0).all(0)
        padded.add(bool(outside.any()))
        assert (mask[outside] == VOID).all()
        source, indices = np.array(sample.image()), np.array(sample.mask(sample.image().size))
        pixels = (image * torch.tensor(HALF.std).view(3, 1, 1) + torch.tensor(HALF.mean).view(3, 1, 1)) * 255
        for label in set(mask.unique().tolist()) - {0, VOID}:
            colour = torch.tensor(source[indices == label].astype(np.float32).mean(0))
            inside = mask == label
            if inside.sum() > 40:
                assert (pixels[:, inside].mean(1) - colour).abs().max() < 30, label
    assert padded == {False, True}


def test_an_image_of_void_alone_has_no_loss():
    logits = torch.randn(1, 21, 4, 4, requires_grad=True)
    loss = segmentation.mean_loss(logits, torch.full((1, 4, 4), VOID))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    masks = torch.randint(0, 21, (1, 4, 4))
    torch.testing.assert_close(segmentation.mean_loss(logits, masks), torch.nn.functional.cross_entropy(logits, masks))


# ---------------------------------------------------------------------------------------------------- counting


def test_perfect_boxes_are_100(voc):
    val, detections = split(voc, "val"), Detections(len(CLASSES))
    for sample in val.samples:
        o = sample.objects()
        detections.add(o.boxes, o.labels, np.ones(len(o.labels)), o)
    values = detection.summary(detections, val)
    assert set(values.values()) == {100.0} and len(values) == 6 + 4
    empty = Detections(len(CLASSES))
    with pytest.raises(UserError, match="no object that is not difficult"):
        detection.summary(empty, val)


def test_perfect_masks_are_100(voc):
    total = sum(
        confusion(np.where(mask == VOID, 7, mask), mask, 21)
        for mask in (np.array(s.mask(s.image().size)) for s in split(voc, "val", "Segmentation").samples)
    )
    values = segmentation.summary(total)
    assert set(values.values()) == {100.0} and len(values) == 2 + 5


class Oracle(torch.nn.Module):
    """A perfect detector: finds the boxes of an image by the sum of its pixels; records the images in order."""

    def __init__(self, samples):
        super().__init__()
        self.truth, self.requested_ids = {}, []
        for sample in samples:
            o = sample.objects()
            key = float(to_tensor(sample.image()).sum())
            self.truth[key] = sample.id, torch.tensor(o.boxes), torch.tensor(o.labels + 1)

    def forward(self, images):
        id, boxes, labels = self.truth[float(images[0].sum())]
        self.requested_ids.append(id)
        return [{"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}]


def test_every_test_image_counts_once(voc):
    val = split(voc, "val")
    oracle = Oracle(val.samples)
    values, picture = detection.evaluate(oracle, val, CPU, threads=2)
    assert oracle.requested_ids == [sample.id for sample in val.samples] and set(values.values()) == {100.0}
    assert len(picture.axes) == 4
    for axes, sample in zip(picture.axes, val.samples, strict=True):
        objects = sample.objects()
        assert [text.get_text() for text in axes.texts] == [f"{CLASSES[c]} 1.00" for c in objects.labels]
        styles = [patch.get_linestyle() for patch in axes.patches]
        assert styles == [":" if hard else "--" for hard in objects.difficult] + ["-"] * len(objects.labels)


def test_a_picture_has_a_few_of_the_images(voc, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_IMAGES", 2)
    val = split(voc, "val")
    _, picture = detection.evaluate(Oracle(val.samples), val, CPU, threads=2)
    shown = [axes.images[0].get_array() for axes in picture.axes]
    assert len(shown) == 2 and all((shown[i] == np.array(val.samples[2 * i].image())).all() for i in range(2))


def test_pictures():
    assert limited(4952, pictures.MAX_IMAGES).tolist() == [4952 * i // 12 for i in range(12)]
    colours = pictures.palette()
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        VOID: (255, 255, 255),
    }
    assert all(tuple(colours[index]) == colour for index, colour in expected.items())
    image, mask = Image.new("RGB", (4, 3)), np.array([[0, 3, 3, VOID]] * 3, np.uint8)
    figure = pictures.masks([(image, mask, mask.clip(max=15))] * 3, segmentation.NAMES)
    assert len(figure.axes) == 9 and [t.get_text() for t in figure.legends[0].texts] == ["background", "bird", "person"]
    assert pictures.boxes([]).axes == []


# ------------------------------------------------------------------------------------------------------ learning


def fit(task, options, folder):
    settings = {"task": "toy", "train": "shapes", "images": "ab", "normalize": {}, "options": {}}
    with loop.claimed(folder):
        return loop.fit(task, options, folder, settings, threads=2)


@pytest.mark.parametrize("kind", [pytest.param("detection", marks=pytest.mark.slow), "segmentation"])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(voc, tmp_path, kind):
    """Proposals are sampled and units dropped by torch's generator, whose state belongs to the step."""

    def build():
        if kind == "detection":
            options = detection.Options(**SMALL)
            return detection.task(pretrained(filled=False), split(voc), options, CPU), options
        options = segmentation.Options(batch_size=3, steps=4, crop=64)
        return segmentation.task(pretrained(filled=False), split(voc, kind="Segmentation"), options, CPU)[0], options

    uninterrupted, options = build()
    assert fit(uninterrupted, options, tmp_path / "uninterrupted") == 0
    stopped, _ = build()
    load, calls = stopped.load, []

    def interrupting(epoch, index):
        calls.append(index)
        if len(calls) == options.batch_size * 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        return load(epoch, index)

    stopped.load = interrupting
    assert fit(stopped, options, tmp_path / "stopped") == 75
    torch.rand(7)  # other draws in between must not matter
    resumed, _ = build()
    assert fit(resumed, options, tmp_path / "stopped") == 0
    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_a_detector_learns_and_finds_the_shapes(voc, tmp_path):
    """From random weights a hundred steps find some of the coloured shapes on images that it has not seen."""
    source = pretrained(filled=False)
    options = detection.Options(**SMALL | {"steps": 100, "batch_size": 4}, lr=0.02, log_every=10)
    task = detection.task(source, split(voc), options, CPU)
    assert fit(task, options, tmp_path) == 0
    values, _ = detection.evaluate(task.model, split(voc, "val"), CPU, threads=2)
    assert values["voc_detection_ap50_area"] > 20, values  # untrained: 0; 50.0 measured


@pytest.mark.slow
def test_a_segmentation_learns(voc, tmp_path):
    source = pretrained(filled=False)
    options = segmentation.Options(steps=250, batch_size=4, crop=64, lr=0.02, log_every=10)
    task, _ = segmentation.task(source, split(voc, kind="Segmentation"), options, CPU)
    assert fit(task, options, tmp_path) == 0
    values, _ = segmentation.evaluate(task.model, split(voc, "val", "Segmentation"), HALF, CPU, threads=2)
    assert values["voc_segmentation_miou"] > 30, values  # untrained: 0; 38.5 measured


def test_a_stopped_training_has_no_results(voc, tmp_path, monkeypatch):
    weights = tmp_path / "resnet8.pth"
    torch.save(backbones.build("resnet8").state_dict(), weights)
    monkeypatch.setattr(loop, "fit", lambda *_: 75)
    words = ["voc", "segmentation", str(weights), "--root", str(voc), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "backbone.name=resnet8"]) == 75
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_the_command_of_detection_on_two_folders(voc, tmp_path, capsys):
    """07+12: trained on both, tested on the first; the same command again evaluates again, to the same numbers."""
    other = voc_folder(tmp_path / "VOC2012", (("train", 6),), seed=1)
    weights = tmp_path / "resnet18.pth"
    torch.save(pretrained("resnet18").backbone.state_dict(), weights)
    words = ["voc", "detection", str(weights), "--root", str(voc), "--root", str(other), "--out", str(tmp_path / "out"),
             "backbone.name=resnet18", "train_split=train", "test_split=val", "steps=3", "batch_size=2",
             "min_sizes=[48]", "test_size=48", "boxes_per_image=8", "statistics_steps=2", "lr=1e-3"]  # fmt: skip
    values = []
    for _ in range(2):
        assert cli.main(words) == 0
        captured = capsys.readouterr()
        records = json.loads((tmp_path / "out" / "results.json").read_text())
        values.append({record["name"]: record["value"] for record in records})
    assert values[0] == values[1] and len(values[0]) == 6 + 4
    assert "taken up after step 3" in captured.err and "VOC2007+VOC2012 train;" in captured.out
    with Image.open(tmp_path / "out" / "figures" / "VOC2007-val-voc-detection.png") as picture:
        assert picture.text["Evaluator"] == "voc detection" and picture.text["Checkpoint"] == records[0]["checkpoint"]
    assert records[0]["dataset"] == "VOC2007" and records[0]["split"] == "val"
    settings = checkpoint.load(checkpoint.path_of(tmp_path / "out" / "detection", 3))["config"]
    assert settings["train"] == "VOC2007+VOC2012 train" and settings["options"]["steps"] == 3
