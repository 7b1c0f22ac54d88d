"""One-vs-rest SVMs on frozen features: features, costs, the optimum, and the command from folder to results.json."""

import json
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from ssl_dist import backbones, cli
from ssl_dist.errors import UserError
from ssl_dist.storage.features import Features
from ssl_dist.voc import classification, pretrained
from ssl_dist.voc.data import CLASSES, read_split
from ssl_dist.voc.metrics import classification_ap
from tests.make_voc import voc_folder
from tests.messages import naming


def features(rows):
    n = len(rows)
    return Features(np.asarray(rows, np.float32), np.full(n, -1, np.int64), np.arange(n), {})


@pytest.fixture(scope="module")
def problem():
    """Features of 90 and 60 images with three classes that a linear classifier finds in part; class 4 is at times
    difficult. Returns train, its labels, test, its labels."""
    rng = np.random.default_rng(0)
    splits = []
    for count in (90, 60):
        labels = np.full((count, 20), -1, np.int8)
        rows = rng.normal(size=(count, 12))
        for column, label in enumerate((2, 4, 14)):
            there = rng.random(count) < 0.3
            labels[there, label] = 1
            rows[there, column] += 1.5
        labels[rng.random(count) < 0.2, 4] = 0
        splits += [features(rows), labels]
    return splits


COSTS = [1e-3, 1e-1, 10.0]


def test_costs_and_values_are_those_of_scikit_learn(problem, capsys):
    train, train_labels, test, test_labels = problem
    options = classification.Options(costs=COSTS)
    values = classification.evaluate(train, train_labels, test, test_labels, options, 2)
    rows, test_rows = classification.unit_rows(train), classification.unit_rows(test)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4)
    eleven, area, costs = [], [], []
    for label in (2, 4, 14):
        positive = train_labels[:, label] == 1  # difficult: negative in training, as in Goyal et al.

        def machine(cost):
            return LinearSVC(C=cost, class_weight={True: 2, False: 1}, dual=False, max_iter=2000)

        scores = [cross_val_score(machine(c), rows, positive, cv=3, scoring="average_precision").mean() for c in COSTS]
        best = COSTS[int(np.argmax(scores))]
        costs.append(f"{CLASSES[label]} {best:.3g}")
        precisions = classification_ap(
            machine(best).fit(rows, positive).decision_function(test_rows), test_labels[:, label]
        )
        assert values[f"voc_classification_ap_{CLASSES[label]}"] == pytest.approx(100 * precisions[0])
        eleven.append(precisions[0])
        area.append(precisions[1])
    assert values["voc_classification_map_11point"] == pytest.approx(100 * np.mean(eleven))
    assert values["voc_classification_map_area"] == pytest.approx(100 * np.mean(area))
    assert values["voc_classification_converged"] == 1.0 and len(values) == 3 + 3
    assert f"costs {', '.join(costs)}\n" in capsys.readouterr().err
    assert classification.evaluate(train, train_labels, test, test_labels, options, 1) == values


def test_the_primal_solution_is_the_optimum_of_the_papers_objective(problem):
    """F(w, b) = (w.w + b.b) / 2 + C sum weight max(0, 1 - y (w.x + b))^2 has a gradient near zero there; LIBLINEAR's
    dual solver, which the paper's code calls, comes to the same."""
    train, train_labels, *_ = problem
    rows, positive = classification.unit_rows(train), train_labels[:, 2] > 0
    for cost in COSTS:
        ours = classification.svm(rows, positive, cost, 2000)
        w, b = torch.tensor(ours.coef_[0], requires_grad=True), torch.tensor(ours.intercept_[0], requires_grad=True)
        y, weight = torch.tensor(np.where(positive, 1.0, -1.0)), torch.tensor(np.where(positive, 2.0, 1.0))
        margin = (1 - y * (torch.tensor(rows) @ w + b)).clamp(min=0)
        objective = (w @ w + b * b) / 2 + cost * (weight * margin**2).sum()
        objective.backward()
        objective = float(objective.detach())
        assert torch.cat([w.grad, b.grad[None]]).norm() < 1e-3 * max(1.0, objective)
        theirs = LinearSVC(
            C=cost, class_weight={True: 2, False: 1}, dual=True, tol=1e-8, max_iter=200000, random_state=0
        ).fit(rows, positive)
        np.testing.assert_allclose(ours.decision_function(rows), theirs.decision_function(rows), atol=2e-3)


def test_perfect_features_are_100(problem):
    _, train_labels, _, test_labels = problem
    train, test = (features((labels > 0) + 0.001) for labels in (train_labels, test_labels))
    values = classification.evaluate(train, train_labels, test, test_labels, classification.Options(costs=[10.0]), 1)
    assert {value for name, value in values.items() if "ap" in name} == {100.0}


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_iterations_that_do_not_suffice_are_reported(problem):
    options = classification.Options(costs=[10.0], max_iter=1)
    assert classification.evaluate(*problem, options, 1)["voc_classification_converged"] == 0.0


def test_too_few_images_of_a_class(problem):
    train, train_labels, test, test_labels = problem
    with pytest.raises(UserError, match="images show a bird; 40 folds need 40"):
        classification.evaluate(train, train_labels, test, test_labels, classification.Options(folds=40), 1)
    missing = test_labels.copy()
    missing[:, 14] = -1
    with pytest.raises(UserError, match="test_split = 'test': no image shows a person"):
        classification.evaluate(train, train_labels, test, missing, classification.Options(), 1)
    with pytest.raises(UserError, match="no image shows any class"):
        nothing = np.full_like(train_labels, -1)
        classification.evaluate(train, nothing, test, nothing, classification.Options(), 1)


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("data") / "VOC2007", (("trainval", 24), ("test", 12)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(backbones.build("resnet8").state_dict(), path)
    return path


def command(voc, weights, out, *more):
    return cli.main(["voc", "classification", str(weights), "--root", str(voc), "--out", str(out),
                     "backbone.name=resnet8", "size=48", "resize=56", "costs=[0.1,1]", *more])  # fmt: skip


def test_from_the_folder_to_results(voc, weights, tmp_path, capsys):
    assert command(voc, weights, tmp_path) == 0
    captured = capsys.readouterr()
    assert (
        "voc_classification_map_11point" in captured.out and "ap_bird" not in captured.out and "24/24" in captured.err
    )
    records = {record["name"]: record for record in json.loads((tmp_path / "results.json").read_text())}
    record = records["voc_classification_map_11point"]
    assert record["value"] > 60 and record["dataset"] == "VOC2007" and record["split"] == "test"
    assert (
        record["options"]["costs"] == [0.1, 1.0]
        and "cost of each class by 3 folds of VOC2007 trainval" in (record["protocol"])
    )
    assert {f"voc_classification_ap_{name}" for name in ("bird", "bus", "cat", "sofa")} <= records.keys()
    assert (record["method"], record["backbone"], record["seed"], record["step"]) == ("small.pth", "resnet8", None, 0)
    assert command(voc, weights, tmp_path) == 0
    assert "features" not in capsys.readouterr().err, "they are there and fresh"
    assert {r["name"]: r["value"] for r in json.loads((tmp_path / "results.json").read_text())} == {
        name: r["value"] for name, r in records.items()
    }
    for change in (["resize=60"], ["layer=layer2"]):
        assert command(voc, weights, tmp_path, *change) == 0
        assert "24/24" in capsys.readouterr().err, "stale, or of another layer"


def test_a_stage_is_averaged_to_at_most_9216_numbers(weights):
    source = pretrained.load(weights, ["backbone.name=resnet8"])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, maps = source.backbone.forward_stages(images)
        for layer, channels, side in (("stem", 16, 24), ("layer2", 32, 16), ("layer3", 64, 12)):
            features = classification.Extractor(source, layer)(images)
            assert features.shape == (2, channels * side * side)
            expected = torch.nn.functional.adaptive_avg_pool2d(maps[layer], side).flatten(1)
            torch.testing.assert_close(features, expected)
        assert torch.equal(classification.Extractor(source, "output")(images), source.backbone(images))
        small = images[..., :16, :16]  # a map of 4 x 4, which is not enlarged
        assert torch.equal(
            classification.Extractor(source, "layer3")(small),
            source.backbone.forward_stages(small)[1]["layer3"].flatten(1),
        )
    with pytest.raises(UserError, match="layer = 'layer9': backbone resnet8 has output, stem, layer1"):
        classification.Extractor(source, "layer9")


def test_the_whole_image_or_its_centre(voc, weights):
    source = pretrained.load(weights, ["backbone.name=resnet8", "views.normalize={mean: [0, 0, 0], std: [1, 1, 1]}"])
    sample = read_split([voc], "Main", "trainval").samples[1]
    image = sample.image()
    assert image.size == (96, 72)
    for crop, expected in (
        ("whole", image.resize((64, 48), 2).resize((32, 32), 2)),
        ("centre", image.resize((64, 48), 2).crop((16, 8, 48, 40))),
    ):
        pixels = classification._input(source, classification.Options(size=32, resize=48, crop=crop))(sample)
        torch.testing.assert_close(pixels * 255, torch.from_numpy(np.array(expected)).permute(2, 0, 1).float())


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(word) for word in arguments]) == 2
    stderr = capsys.readouterr().err
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr
    return lines[0]


def test_what_the_command_refuses(voc, weights, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def refused(*more, root=voc, file=weights, task="classification", name="backbone.name=resnet8"):
        words = ["voc", task, file, "--root", root, "--out", out, *([name] if name else []), *more]
        return refusal(capsys, *words)

    assert "csts" in refused("csts=[1]") and "costs" in refused("csts=[1]")
    assert "resize" in refused("size=300")
    assert "write key=value" in refused("=3")
    assert "no folder in VOC's format" in refused(root=tmp_path)
    assert "there are test, trainval" in refused("test_split=val")
    assert "stands there twice" in refused("--root", voc / "." / "..", "--root", voc.parent)
    assert "24 images are in both" in refused("test_split=trainval")
    assert "needs a residual network" in refused(task="detection")
    assert "not found" in refused(file=tmp_path / "none.pth", name=None)
    assert "backbone.name=..." in refused(name=None)
    assert "views.normalize" in refused("views.normalize=3") and "std" in refused("views.normalize={mean: [0,0,0]}")
    assert "needs backbone.name" in refused("views.normalize={mean: [0,0,0], std: [1,1,1]}", name=None)
    assert "a folder, whose run tells it" in refused(file=tmp_path)
    assert "shape" in refused(name="backbone.name=resnet20") or "lacks" in refused(name="backbone.name=resnet20")
    assert not (out / "results.json").exists()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "one process" in refused()


def test_constants_that_no_rgb_pixels_of_0_to_1_have_are_refused(weights):
    def refused(constants, *words):
        with pytest.raises(UserError, match=naming(*words)) as caught:
            pretrained.load(weights, ["backbone.name=resnet8", f"views.normalize={constants}"])
        return str(caught.value)

    levels = "{mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375]}"
    remedy = refused(levels, "views.normalize = {mean: [123.675", "pixels in 0..1").rpartition("it is ")[2]
    load = partial(pretrained.load, weights)
    assert load(["backbone.name=resnet8", f"views.normalize={remedy}"]).normalize.mean == (0.485, 0.456, 0.406)
    for few in ("{mean: [0.5], std: [0.5]}", "{mean: [0, 0, 0, 0], std: [1, 1, 1, 1]}"):
        refused(few, "channels, and the images have 3; give a value of each, or leave it out")
    assert load(["backbone.name=resnet8"]).normalize.mean == (0.485, 0.456, 0.406), "as the message says"


def test_the_metadata_of_an_exported_file(tmp_path):
    """Its backbone, method, step and constants. Damaged metadata are refused; others get ImageNet's constants."""
    tensors = {name: t.contiguous() for name, t in backbones.build("resnet8").state_dict().items()}
    metadata = {"backbone": "resnet8", "method": "relational", "checkpoint": "ab" * 32, "step": "40",
            "normalize": '{"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}'}  # fmt: skip
    path = tmp_path / "model.safetensors"

    def load(changes, *overrides):
        safetensors.torch.save_file(tensors, path, {k: v for k, v in (metadata | changes).items() if v is not None})
        return pretrained.load(path, overrides)

    loaded = load({})
    assert (loaded.name, loaded.method, loaded.step, loaded.normalize.mean) == (
        "resnet8",
        "relational",
        40,
        (0.1, 0.2, 0.3),
    )
    assert load({}, "views.normalize={mean: [0, 0, 0], std: [1, 1, 1]}").normalize.mean == (0, 0, 0)
    without_step = load({"step": None}, "backbone.name=resnet8")
    assert (without_step.method, without_step.step, without_step.normalize.mean) == (
        "model.safetensors",
        0,
        (0.485, 0.456, 0.406),
    )
    for changes in ({"step": "x"}, {"normalize": "{"}, {"normalize": "[1]"}, {"normalize": '{"mean": 3}'}):
        with pytest.raises(UserError, match=r"model.safetensors: .*normalize"):
            load(changes)
    with pytest.raises(UserError, match="no such backbone"):
        load({"backbone": "resnet9"})


def test_an_image_that_is_cut_short_is_named(weights, tmp_path, capsys):
    root = voc_folder(tmp_path / "VOC2007", (("trainval", 24), ("test", 12)))
    path = sorted((root / "JPEGImages").iterdir())[3]
    path.write_bytes(path.read_bytes()[:900])
    line = refusal(capsys, "voc", "classification", weights, "--root", root, "--out", tmp_path / "out",
                   "backbone.name=resnet8", "size=32", "resize=32")  # fmt: skip
    assert f"{path}: can not be read as an image" in line


@pytest.mark.slow
def test_runs_and_exports_arrive_as_they_are(digits, voc, tmp_path, capsys):
    """A run's folder, its checkpoint file and its export give the same numbers under the run's name."""
    from ssl_dist import config
    from ssl_dist.train.loop import train

    run, file = tmp_path / "run", tmp_path / "model.safetensors"
    torch.save(backbones.build("resnet18").state_dict(), tmp_path / "first.pth")
    overrides = [f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", "backbone.name=resnet18"]
    overrides.append(f"backbone.weights={tmp_path / 'first.pth'}")
    assert train(config.load("configs/digits/random_weights-conv4.yaml", overrides)) == 0
    assert cli.main(["export", str(run), "--format", "torchvision", "--out", str(file)]) == 0
    sources = [pretrained.load(path, []) for path in (run, run / "checkpoints" / "step-00000000.pt", file)]
    for source in sources:
        assert (source.name, source.method, source.step) == ("resnet18", "random_weights", 0)
        assert source.normalize == sources[0].normalize and not source.backbone.training
        for name, tensor in sources[0].backbone.state_dict().items():
            assert torch.equal(tensor, source.backbone.state_dict()[name])
    assert sources[0].normalize.mean != (0.485, 0.456, 0.406)
    assert sources[0].seed == 0 and sources[2].seed is None
    words = ["voc", "segmentation", str(file), "--root", str(voc), "--out", str(tmp_path / "out"), "steps=2",
             "train_split=trainval", "test_split=test", "batch_size=4", "crop=64"]  # fmt: skip
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "voc_segmentation_miou" in capsys.readouterr().out
    assert (tmp_path / "out" / "segmentation" / "checkpoints" / "step-00000002.pt").exists()
    assert "options.steps (there 2, now 3)" in refusal(capsys, *words, "steps=3")
    assert "is for files of weights" in refusal(capsys, *words[:2], run, *words[3:], "views.normalize={}")


def test_average_precision_of_the_folds_is_scikit_learns():
    rng = np.random.default_rng(3)
    rows, positive = rng.normal(size=(40, 5)), rng.random(40) < 0.4
    options = classification.Options(costs=[0.01, 1.0], folds=4)
    cost = classification.choose_cost(rows, positive, options)
    means = [
        cross_val_score(
            classification.svm(rows, positive, c, 2000), rows, positive, cv=4, scoring="average_precision"
        ).mean()
        for c in (0.01, 1.0)
    ]
    assert cost == (0.01, 1.0)[int(np.argmax(means))] and average_precision_score(positive, rows[:, 0]) <= 1
