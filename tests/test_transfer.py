"""Probes and fine-tunings of real runs: what they train and measure, on any number of ranks, and after a stop."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from ssl_dist import cli, config
from ssl_dist.convert.command import convert
from ssl_dist.data.normalize import normalized
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from ssl_dist.evaluate.command import evaluate
from ssl_dist.evaluators import finetune, probe
from ssl_dist.results import confusion
from ssl_dist.run.encoder import BATCH_SIZE, load_encoder, load_method, load_together, outputs
from ssl_dist.storage import checkpoint
from ssl_dist.transfer import classification
from tests import ranks
from tests.make_images import simple_folder

SHORT = ["probe.epochs=2", "finetune.epochs=2", "probe.batch_size=96", "finetune.batch_size=96", "probe.lr=0.1"]


def pretrained(digits, run, *more):
    from ssl_dist.train.loop import train

    overrides = [f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", "data.workers=1", *more]
    assert train(config.load("configs/digits/random_weights-conv4.yaml", overrides)) == 0
    return run


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    return pretrained(digits, tmp_path_factory.mktemp("runs") / "random")


@pytest.fixture(scope="module")
def measured(run):
    """Records by name of a probe and a fine-tuning, and the checkpoint of each."""
    code, records = evaluate(run, ["probe", "finetune"], SHORT)
    assert code == 0
    states = {folder.name.split("-")[0]: checkpoint.load_run(folder)[1] for folder in (run / "evaluations").iterdir()}
    return {record["name"]: record["value"] for record in records}, states


def test_probe_and_fine_tuning_are_measured_once(run, measured, capsys):
    values, _ = measured
    assert set(values) == {"probe_top1", "probe_top5", "finetune_top1", "finetune_top5"}
    assert 15 < values["probe_top1"] < values["probe_top5"] <= 100
    (run / "features").mkdir(exist_ok=True)
    capsys.readouterr()
    _, again = evaluate(run, ["probe", "finetune"], SHORT)
    assert capsys.readouterr().err.count("already") == 2
    assert {record["name"]: record["value"] for record in again} == values
    assert not list((run / "features").iterdir()), "images were asked for, not features"


def test_probe_and_fine_tuning_have_confusion_matrices(run, measured):
    for name in ("probe", "finetune"):
        for kind in ("confusion", "classes"):
            with Image.open(run / "figures" / f"digits-test-{name}-{kind}.png") as picture:
                texts = picture.text
            assert texts["Evaluator"] == name and "355 images of digits test" in texts["Description"]
            assert texts["Checkpoint"] == load_encoder(run).sha256
        with Image.open(run / "figures" / f"digits-test-{name}-confusion.png") as picture:
            assert f"{measured[0][f'{name}_top1']:.2f} % of all images" in picture.text["Description"]


def test_a_probe_does_not_change_the_backbone(run, measured):
    encoder = load_encoder(run).module.state_dict()
    state = measured[1]["probe"]
    assert state["config"]["method"]["name"] == "linear_probe" and state["step"] == 2 * (1442 // 96)
    for name, tensor in encoder.items():
        assert torch.equal(state["method"][f"backbone.{name}"], tensor), name
    assert [len(group["params"]) for group in state["optimizer"]["param_groups"]] == [2]


def test_a_fine_tuning_trains_the_whole_backbone(run, measured):
    encoder, state = load_encoder(run).module.state_dict(), measured[1]["finetune"]
    changed = [name for name, tensor in encoder.items() if not torch.equal(state["method"][f"backbone.{name}"], tensor)]
    assert set(encoder) == set(changed)
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [1e-3, 1e-3 * 0.1]


def test_the_accuracies_are_those_of_single_images(run, measured, digits):
    """Recomputed with the saved classifier, one test image at a time."""
    [folder] = [path for path in (run / "evaluations").iterdir() if path.name.startswith("probe")]
    method, encoder = load_method(folder)
    correct, among_five = 0, 0
    with Dataset(digits, reader="arrays").open("test") as reader, torch.no_grad():
        count = reader.info.count
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.normalize.mean, encoder.normalize.std))
        for pixels, _, _, [image_id] in reader.batches([[i] for i in range(count)]):
            image = (torch.from_numpy(pixels[0]).permute(2, 0, 1) / 255 - mean) / std
            order = method.eval().logits(image[None])["output"][0].argsort(descending=True).tolist()
            label = int(reader.labels([image_id])[0])
            correct, among_five = correct + (order[0] == label), among_five + (label in order[:5])
    assert measured[0]["probe_top1"] == pytest.approx(100 * correct / count)
    assert measured[0]["probe_top5"] == pytest.approx(100 * among_five / count)


def test_scores_of_ten_crops_are_the_mean_of_those_of_each(run, measured, digits):
    """Recomputed with the saved classifier and torchvision's crops, one test image at a time."""
    [folder] = [path for path in (run / "evaluations").iterdir() if path.name.startswith("probe")]
    transform = ["data.eval_resize=40"]
    _, records = evaluate(run, ["classify"], [f"classify.head={folder}", "classify.crops=10", *transform])
    method, encoder = load_method(folder)
    correct = 0
    with Dataset(digits, reader="arrays").open("test") as reader, torch.no_grad():
        count = reader.info.count
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.normalize.mean, encoder.normalize.std))
        for pixels, _, _, [image_id] in reader.batches([[i] for i in range(count)]):
            crops = functional.ten_crop(functional.resize(Image.fromarray(pixels[0]), 40), [32, 32])
            batch = torch.stack([(functional.to_tensor(crop) - mean) / std for crop in crops])
            scores = method.eval().logits(batch)["output"].mean(0)
            correct += int(scores.argmax()) == int(reader.labels([image_id])[0])
    values = {record["name"]: record["value"] for record in records}
    assert values["classify_top1"] == pytest.approx(100 * correct / count) and len(values) == 2
    assert "ten crops" in records[0]["protocol"] and "centre crop" not in records[0]["protocol"]


def test_selas_probe_is_tested_on_ten_crops():
    assert "ten crops" in probe.protocol(probe.Options(recipe="sela_alexnet"))
    assert "centre crop" in probe.protocol(probe.Options(recipe="sela_alexnet", crops=1))
    assert "ten crops" in probe.protocol(probe.Options(crops=10))
    for recipe in ("relational", "sela_resnet", "sfrik"):
        assert probe.protocol(probe.Options(recipe=recipe)).endswith("centre crop")


def test_a_saved_classifier_is_used_without_training(run, measured):
    [folder] = [path for path in (run / "evaluations").iterdir() if path.name.startswith("probe")]
    before = sorted(path.name for path in (run / "evaluations").iterdir())
    _, records = evaluate(run, ["classify"], [f"classify.head={folder}"])
    values = {record["name"]: record["value"] for record in records}
    assert values == {"classify_top1": measured[0]["probe_top1"], "classify_top5": measured[0]["probe_top5"]}
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == before


def test_scores_that_are_not_finite_are_no_accuracy(run, measured, monkeypatch):
    """BatchNorm in training mode hides that a network has diverged."""
    [folder] = [path for path in (run / "evaluations").iterdir() if path.name.startswith("probe")]

    def broken(*arguments):
        for number, scores in enumerate(outputs(*arguments)):
            scores[7 if number else len(scores) :] = np.nan  # the eighth of the second batch and all behind it
            yield scores

    monkeypatch.setattr(classification, "outputs", broken)
    with pytest.raises(UserError, match=rf"scores of image {BATCH_SIZE + 7} of digits test are not finite"):
        evaluate(run, ["classify"], [f"classify.head={folder}", "data.eval_resize=36"])


def test_a_supervised_run_classifies_itself(digits, tmp_path):
    from ssl_dist.train.loop import train

    run = tmp_path / "supervised"
    settings = config.load(
        "configs/digits/supervised-conv4.yaml",
        [f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", "optim.epochs=null", "optim.steps=40"],
    )
    assert train(settings) == 0
    _, records = evaluate(run, ["classify"], [])
    assert records[0]["name"] == "classify_top1" and records[0]["value"] > 40
    with pytest.raises(UserError, match=r"classify.head = null: was trained on images of train\[held out 10%\]"):
        evaluate(run, ["classify"], [], validation=0.1)
    _, [record, *_] = evaluate(run, ["knn"], ["knn.k=[5]"], validation=0.1)
    assert "may have been trained on these labels" in record["protocol"]

    # Another data set, where classes are fewer and in another order: the labels are other numbers of the same names.
    with Dataset(digits, reader="arrays").open("test") as reader:
        chosen = np.flatnonzero(np.isin(reader.labels(np.arange(reader.info.count)), (3, 7, 8)))
        for i, (pixels, _, _, _) in zip(chosen, reader.batches([[i] for i in chosen]), strict=True):
            path = tmp_path / "photos" / "test" / str(reader.labels([i])[0]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0]).save(path)
    shutil.copytree(tmp_path / "photos" / "test", tmp_path / "photos" / "train")
    convert("folder", tmp_path / "photos", tmp_path / "three", name="three", progress=False)
    there = [f"data.root={tmp_path / 'three'}", "data.name=three", "data.reader=arrays"]
    _, [record, *_] = evaluate(run, ["classify"], there)
    right = _right(run, digits, chosen)
    assert record["value"] == pytest.approx(100 * right / len(chosen)) and right > len(chosen) / 3
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "7").rename(tmp_path / "photos" / split / "seven")
    convert("folder", tmp_path / "photos", tmp_path / "three", name="three", progress=False)
    with pytest.raises(UserError, match=r"class 'seven' of test is none of the 10 that .* \('0, 1, 2,"):
        evaluate(run, ["classify"], there)


def _right(run, digits, ids):
    """How many of the test images the run's own classifier gets right."""
    method, encoder = load_method(run)
    to_input = normalized(encoder.normalize, torch.float32, torch.device("cpu"))
    with Dataset(digits, reader="arrays").open("test") as reader, torch.no_grad():
        pixels = np.concatenate([images for images, _, _, _ in reader.batches([[i] for i in ids])])
        scores = method.eval().logits(to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2)))["output"]
        return int((scores.argmax(1).numpy() == reader.labels(ids)).sum())


def test_classes_of_a_checkpoint_that_does_not_name_them_are_matched_by_number(run, measured, tmp_path, capfd):
    [folder] = [path for path in (run / "evaluations").iterdir() if path.name.startswith("probe")]
    state = checkpoint.load_newest(folder)[1]
    assert state.pop("classes") == [str(digit) for digit in range(10)]
    checkpoint.save(tmp_path, state)
    _, records = evaluate(run, ["classify"], [f"classify.head={tmp_path}"])
    assert records[0]["value"] == measured[0]["probe_top1"]
    assert "does not name its classes; those of digits are matched by number" in capfd.readouterr().err


def test_a_classifier_belongs_to_its_checkpoint(run, measured, digits, tmp_path):
    [folder] = [path for path in (run / "evaluations").iterdir() if path.name.startswith("probe")]
    other = pretrained(digits, tmp_path / "other", "seed=1")
    with pytest.raises(UserError, match=r"was not trained on the newest checkpoint of .*other; evaluate the run"):
        evaluate(other, ["classify"], [f"classify.head={folder}"])
    with pytest.raises(UserError, match=r"was trained on images of train\[held out"):
        evaluate(run, ["classify"], [f"classify.head={folder}"], validation=0.1)


def test_a_classifier_is_measured_on_the_images_held_out_from_it(digits, tmp_path):
    run = pretrained(digits, tmp_path / "run")
    _, records = evaluate(run, ["probe"], ["probe.epochs=2", "probe.lr=0.1"], validation=0.1)
    [folder] = (run / "evaluations").iterdir()
    _, again = evaluate(run, ["classify"], [f"classify.head={folder}"], validation=0.1)
    assert [r["value"] for r in again] == [r["value"] for r in records] and again[0]["split"] == records[0]["split"]


def test_a_smaller_choice_of_neighbours_leaves_other_records(run):
    names = []
    for words in ([], ["knn.k=[20]"], []):
        names.append([record["name"] for record in evaluate(run, ["knn"], words)[1]])
    assert names[0] == names[2] and len(names[0]) == 4 and len(names[1]) == 2


def test_every_stage_has_its_probe(run):
    _, records = evaluate(run, ["probe"], ["probe.stages=all", "probe.epochs=1", "probe.lr=0.01"])
    names = [record["name"] for record in records if record["name"].endswith("top1")]
    assert names == [f"probe_layer{number}_top1" for number in (1, 2, 3, 4)]
    assert all(record["value"] > 15 for record in records)
    assert "stages (all)" in records[0]["protocol"]


def test_transfer_to_other_classes(run, tmp_path):
    """The encoder of one data set, probed on another one with classes of its own."""
    simple_folder(tmp_path / "images", per_class=24, size=(40, 36))
    convert("folder", tmp_path / "images", tmp_path / "shapes", name="shapes", workers=1, progress=False)
    other = ["data.name=shapes", f"data.root={tmp_path / 'shapes'}"]
    _, records = evaluate(run, ["probe"], [*other, "probe.epochs=1", "probe.batch_size=8"])
    assert {record["dataset"] for record in records} == {"shapes"}
    [folder] = (path for path in (run / "evaluations").iterdir() if "shapes" in (path / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"class '0' of test is none of the 2 that .* \('blue, red'\); name"):
        evaluate(run, ["classify"], [f"classify.head={folder}"])


@pytest.mark.parametrize(
    ("evaluator", "overrides", "message"),
    [
        ("probe", ["probe.recipe=moco"], "probe.recipe"),
        ("probe", ["probe.batch_size=100000"], "probe.batch_size = 100000"),
        (
            "probe",
            ["probe.stages=[layer9]"],
            r"probe.stages = \['layer9'\]: the backbone has layer1, layer2, layer3, layer4",
        ),
        ("finetune", ["finetune.lr=0"], "finetune.lr"),
        ("classify", [], "holds random_weights, which does not classify; give the folder"),
        ("classify", ["classify.head=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes(run, evaluator, overrides, message):
    before = sorted((run / "evaluations").iterdir()) if (run / "evaluations").exists() else []
    with pytest.raises(UserError, match=message):
        evaluate(run, [evaluator], overrides)
    assert before == (sorted((run / "evaluations").iterdir()) if (run / "evaluations").exists() else [])


def test_weights_of_others_have_a_probe_for_every_way_to_prepare_images(run, digits, tmp_path):
    path, out = tmp_path / "others.pth", tmp_path / "out"
    torch.save(load_encoder(run).module.state_dict(), path)
    images = [f"data.root={digits}", "data.reader=arrays", "backbone.name=conv4"]
    for more in ([], ["views.normalize=none"], ["data.eval_resize=36"]):
        code, _ = evaluate(path, ["probe"], ["probe.epochs=1", *images, *more], out=out)
        assert code == 0
    assert len(list((out / "evaluations").iterdir())) == 3


def test_every_recipe_makes_a_training(run):
    """Each paper's protocol is a valid config and says what it does."""
    for module in (probe, finetune):
        for name, recipe in module.RECIPES.items():
            options = module.Options(recipe=name, epochs=7)
            sentence = module.protocol(options)
            assert recipe.paper in sentence and "7 epochs" in sentence and f"rate {recipe.optim['lr']:g}" in sentence
            config.validate(config.Optim, recipe.optim)
    last_column = finetune.protocol(finetune.Options(recipe="relational_stl10"))  # of relational reasoning's Table 1
    assert "20 epochs" in last_column and "affine and erasing" in last_column


# ---------------------------------------------------------------------------------------------------- many ranks


def load_on_rank(rank, size, runs):
    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.distributed.world import join_world
    from ssl_dist.grid import Grid

    with join_world(RankInfo.from_environment(), Grid(size, 1)) as world:
        return load_together(Path(runs[rank]), world)[1].sha256


def test_all_ranks_measure_the_checkpoint_of_the_first(digits, tmp_path):
    """Also when a training saves another checkpoint between two ranks' reads."""
    runs = [str(pretrained(digits, tmp_path / f"run{seed}", f"seed={seed}")) for seed in (0, 1)]
    digests = ranks.launch(load_on_rank, 2, tmp_path, runs)
    assert digests == [load_encoder(Path(runs[0])).sha256] * 2


def in_ranks(rank, size, run):
    torch.set_num_threads(1)
    code, records = evaluate(Path(run), ["knn", "probe", "finetune"], SHORT)
    return code, {record["name"]: record["value"] for record in records}


@pytest.mark.slow
def test_any_world_size_measures_the_same(digits, tmp_path):
    """355 test images, which neither 2 nor 3 divides; in float64, where no image lies on a decision boundary."""
    values, states = {}, {}
    for count in (1, 2, 3):
        run = pretrained(digits, tmp_path / str(count) / "run", "precision=fp64")
        (tmp_path / f"ranks{count}").mkdir()
        answers = ranks.launch(in_ranks, count, tmp_path / f"ranks{count}", str(run))
        assert all(answer == answers[0] for answer in answers) and answers[0][0] == 0
        values[count] = answers[0][1]
        for folder in (run / "evaluations").iterdir():
            states[count, folder.name.split("-")[0]] = checkpoint.load_run(folder)[1]["method"]
    assert len(values[1]) == 8
    for size in (2, 3):
        assert values[1] == values[size]
        for name in ("probe", "finetune"):
            for key, tensor in states[1, name].items():
                np.testing.assert_allclose(
                    states[size, name][key], tensor, rtol=1e-9, atol=1e-9, err_msg=f"{size} {key}"
                )


@pytest.mark.slow
def test_a_stopped_fine_tuning_resumes_exactly(digits, tmp_path):
    """SIGTERM in a fine-tuning: exit code 75, and the same command ends with the bits of an uninterrupted one."""
    options = ["finetune", "finetune.epochs=12", "finetune.batch_size=32", "data.subset={per_class: 80}"]
    results = {}
    for name in ("uninterrupted", "stopped"):
        run = pretrained(digits, tmp_path / name)
        words = ["evaluate", str(run), *options]
        if name == "stopped":
            process = subprocess.Popen([sys.executable, "-m", "ssl_dist", *words], stderr=subprocess.PIPE, text=True)
            while not list(run.glob("evaluations/*/checkpoints/step-*.pt")):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == 75 and "the same command goes on" in stderr
            [folder] = (run / "evaluations").iterdir()
            assert 0 < checkpoint.load_run(folder)[1]["step"] < 12 * (800 // 32)
            assert not (run / "results.json").exists()
        assert cli.main(words) == 0
        [folder] = (run / "evaluations").iterdir()
        state = checkpoint.load_run(folder)[1]
        values = [record["value"] for record in json.loads((run / "results.json").read_text())]
        results[name] = values, state["method"], state["optimizer"]["state"]
    assert results["uninterrupted"][0] == results["stopped"][0]
    for key, tensor in results["uninterrupted"][1].items():
        assert torch.equal(tensor, results["stopped"][1][key]), key
    for number, moments in results["uninterrupted"][2].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(results["stopped"][2][number][k]))
            for k, v in moments.items()
        )


def test_a_classifier_of_many_classes_needs_no_matrix_of_them(run, digits, monkeypatch):
    """Above `confusion.MAX_CLASSES` hits are counted, not pairs of classes; the numbers are the same."""
    _, expected = evaluate(run, ["probe"], ["probe.epochs=1", "probe.batch_size=64"])
    monkeypatch.setattr(confusion, "MAX_CLASSES", 5)
    classified = []
    monkeypatch.setattr("ssl_dist.transfer.recipe.draw", lambda *arguments: classified.append(arguments[0]))
    (run / "results.json").unlink()
    _, records = evaluate(run, ["probe"], ["probe.epochs=1", "probe.batch_size=64"])
    assert [record["value"] for record in records] == [record["value"] for record in expected]
    assert [each.confusion for each in classified] == [None]


@pytest.mark.slow
def test_the_best_epoch_by_held_out_images(digits, tmp_path):
    """That of the trainings which end after each epoch; its head is kept, and the record names the choice."""
    run = pretrained(digits, tmp_path / "run")
    words = ["probe.lr=0.05", "probe.batch_size=64"]
    ends = [evaluate(run, ["probe"], [*words, f"probe.epochs={n}"], validation=0.2)[1][0]["value"] for n in (1, 2, 3)]
    before = set((run / "evaluations").iterdir())
    _, records = evaluate(run, ["probe"], [*words, "probe.epochs=3", "probe.epoch=best"], validation=0.2)
    assert records[0]["value"] == max(ends)
    assert "the epoch with the highest top-1 on the images measured" in records[0]["protocol"]
    [folder] = set((run / "evaluations").iterdir()) - before
    [step] = checkpoint.steps(folder)
    per_epoch = checkpoint.load_newest(folder)[1]["info"]["steps_per_epoch"]
    assert step == (ends.index(max(ends)) + 1) * per_epoch
    _, [record, *_] = evaluate(run, ["classify"], [f"classify.head={folder}"], validation=0.2)
    assert record["value"] == max(ends)
    with pytest.raises(UserError, match=r"probe\.epoch = best: .*; give --validation, and measure the head"):
        evaluate(run, ["probe"], [*words, "probe.epochs=3", "probe.epoch=best"])
