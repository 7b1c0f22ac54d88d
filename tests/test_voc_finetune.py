"""VOC classification by fine-tuning with BatchNorm's statistics kept, after DeepCluster's PyTorch code."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from ssl_dist import backbones, cli
from ssl_dist.errors import UserError
from ssl_dist.keys import EVALUATION, TRANSFER, hash64
from ssl_dist.voc import finetune, loop
from ssl_dist.voc.data import normalized, read_split
from tests.make_voc import voc_folder
from tests.test_voc_tasks import CPU, HALF, pretrained, slim_alexnet

SMALL = {"batch_size": 4, "size": 32, "steps": 3}


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("data") / "VOC2007", (("trainval", 12), ("test", 6)))


def test_the_loss_counts_no_difficult_class():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 20)), rng.integers(-1, 2, (3, 20))
    expected = 0.0
    for row, truth in zip(logits, labels, strict=True):
        for logit, label in zip(row, truth, strict=True):
            if label != 0:
                expected += np.log1p(np.exp(-label * logit)) / 3
    loss = finetune.summed_loss(torch.tensor(logits), torch.tensor(labels, dtype=torch.int8))
    assert float(loss) == pytest.approx(expected)


def test_crops_are_squares_of_10_to_50_percent():
    """An image whose red and green are its columns and rows shows where a crop was cut."""
    ys, xs = np.mgrid[:150, :200]
    image = Image.fromarray(np.stack([xs, ys, xs * 0], 2).astype(np.uint8))
    shares, flips = [], []
    for number in range(60):
        crop = np.array(finetune.random_crop(image, hash64(number), finetune.Options(size=32)), float)
        again = np.array(finetune.random_crop(image, hash64(number), finetune.Options(size=32)), float)
        assert crop.shape == (32, 32, 3) and np.array_equal(crop, again)
        width = abs(crop[:, -1, 0] - crop[:, 0, 0]).mean() * 32 / 31
        height = (crop[-1, :, 1] - crop[0, :, 1]).mean() * 32 / 31
        assert width == pytest.approx(height, abs=2.5)
        shares.append(width * height / (200 * 150))
        flips.append(crop[0, 0, 0] > crop[0, -1, 0])
    assert 0.08 < min(shares) < 0.16 and 0.44 < max(shares) < 0.53 and 15 < sum(flips) < 45


@pytest.mark.parametrize("trained", ["all", "classifier", "classifier and batchnorm"])
def test_what_one_step_changes_of_alexnet(voc, trained):
    source = slim_alexnet()
    before = {name: tensor.clone() for name, tensor in source.backbone.state_dict().items()}
    options = finetune.Options(
        **SMALL | {"size": 224, "batch_size": 2}, trained=trained.split()[0], train_batchnorm="batchnorm" in trained
    )
    task = finetune.task(source, read_split([voc], "Main", "trainval"), options, CPU)
    begun = {name: tensor.clone() for name, tensor in source.backbone.state_dict().items()}
    for name, tensor in begun.items():
        anew = name.startswith("classifier.")
        assert torch.equal(tensor, before[name]) != anew, name
    assert (begun["classifier.1.bias"] == 0.1).all() and begun["classifier.1.weight"].std() == pytest.approx(0.01, 0.1)
    task.train_mode()
    assert source.backbone.classifier[0].training, "dropout of fc6 and fc7"
    optimizer = loop._optimizer(task.model, options)
    sum(task.loss([task.load(0, 0), task.load(0, 1)]).values()).backward()
    optimizer.step()
    convolutions = tuple(f"features.{n}." for n in (0, 4, 8, 11, 14))
    for name, tensor in source.backbone.state_dict().items():
        changes = not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        if trained == "classifier":
            changes &= name.startswith("classifier.")
        elif trained != "all":
            changes &= not name.startswith(convolutions)
        assert torch.equal(tensor, begun[name]) != changes, name


def test_of_a_resnet_the_linear_layer_alone(voc):
    source = pretrained("resnet8")
    task = finetune.task(
        source, read_split([voc], "Main", "trainval"), finetune.Options(**SMALL, trained="classifier"), CPU
    )
    assert [name for name, p in task.model.named_parameters() if p.requires_grad] == [
        "top_layer.weight",
        "top_layer.bias",
    ]
    with pytest.raises(UserError, match=r"size = 64: does not fit the backbone: alexnet takes images of 223"):
        finetune.build(slim_alexnet(), finetune.Options(size=64))


def test_scores_are_the_sum_over_ten_crops(voc, monkeypatch):
    test, options, scores = read_split([voc], "Main", "test"), finetune.Options(**SMALL), []
    model, _ = finetune.build(pretrained("resnet8"), options)
    monkeypatch.setattr(finetune, "summary", lambda rows, labels: scores.append((rows, labels)) or {})
    finetune.evaluate(model, test, HALF, options, CPU, threads=2)
    finetune.evaluate(model, test, HALF, options.model_copy(update={"test_crops": "fixed"}), CPU, threads=2)
    (random, labels), (fixed, _) = scores
    assert random.shape == (6, 20) and np.array_equal(labels, test.labels) and not np.allclose(random, fixed)
    image = test.samples[4].image()
    with torch.no_grad():
        keys = [hash64(0, TRANSFER, EVALUATION, 4, number) for number in range(10)]
        crops = [normalized(finetune.random_crop(image, key, options), HALF) for key in keys]
        torch.testing.assert_close(torch.tensor(random[4]), sum(model(crop[None])[0] for crop in crops))
        small = image.resize((int(37 * 96 / 72), 37) if image.width > image.height else (37, int(37 * 96 / 72)), 2)
        w, h = small.size
        corners = [(0, 0), (w - 32, 0), (0, h - 32), (w - 32, h - 32), (round((w - 32) / 2), round((h - 32) / 2))]
        total = 0
        for x, y in corners:
            for whole in (small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
                total += model(normalized(whole.crop((x, y, x + 32, y + 32)), HALF)[None])[0]
        torch.testing.assert_close(torch.tensor(fixed[4]), total)


def test_the_mean_average_precision_is_scikit_learns():
    rng = np.random.default_rng(1)
    labels = np.full((40, 20), -1, np.int8)
    labels[:, 2], labels[:, 7] = rng.integers(-1, 2, (2, 40))
    scores = rng.integers(0, 9, (40, 20)).astype(float)  # many are equal
    values = finetune.summary(scores, labels)
    expected = []
    for label in (2, 7):
        counted = labels[:, label] != 0
        positive = labels[counted, label] > 0
        expected.append(100 * average_precision_score(positive, scores[counted, label] - 1e-5 * positive))
    assert values["voc_finetune_map"] == pytest.approx(np.mean(expected))
    assert set(values) == {"voc_finetune_map", "voc_finetune_map_11point", "voc_finetune_map_area",
                           "voc_finetune_ap_bird", "voc_finetune_ap_cat"}  # fmt: skip


def test_from_the_folder_to_results(voc, tmp_path, capsys):
    weights = tmp_path / "resnet8.pth"
    torch.manual_seed(0)
    torch.save(backbones.build("resnet8").state_dict(), weights)
    words = ["voc", "finetune", str(weights), "--root", str(voc), "--out", str(tmp_path / "out"),
             "backbone.name=resnet8", "batch_size=4", "size=32", "steps=12", "lr=0.02"]  # fmt: skip
    assert cli.main(words) == 0
    assert "voc_finetune_map_11point" in capsys.readouterr().out
    records = {record["name"]: record for record in json.loads((tmp_path / "out" / "results.json").read_text())}
    record = records["voc_finetune_map"]
    assert record["split"] == "test" and record["options"]["scale"] == [0.1, 0.5]
    assert "12 steps of 4" in record["protocol"] and "on VOC2007 trainval;" in record["protocol"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and lines[-1]["lr"] == pytest.approx(0.02 / 2**15)
    assert cli.main(words) == 0
    assert "taken up after step 12" in capsys.readouterr().err
