"""What a recorded number is of: it is taken from results.json as long as nothing that it depends on has changed."""

import json
import re
import shutil

import numpy as np
import pytest

from ssl_dist import cli, config, results
from ssl_dist.convert.command import convert
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.evaluate import command
from ssl_dist.evaluate.command import evaluate
from ssl_dist.evaluators import knn
from ssl_dist.results.records import LATER_FIELDS
from ssl_dist.run.blueprint import derive
from ssl_dist.storage.features import read_features, write_features
from ssl_dist.train.loop import train
from tests.make_images import save

KNN = ["knn"], ["knn.k=[1]"]
COLOURS = {"blue": (20, 30, 220), "red": (220, 30, 20)}


def source_of(root, **exchanged):
    """train/ and test/ of two classes of plain pictures; exchanged: the class whose folder holds another colour."""
    for split, count in (("train", 6), ("test", 3)):
        for name in COLOURS:
            for i in range(count):
                colour = np.array(COLOURS[exchanged.get(name, name) if split == "train" else name]) + 2 * i
                save(root / split / name / f"{i}.png", np.full((32, 32, 3), colour, np.uint8))
    return root


@pytest.fixture
def run(tmp_path):
    """A run of random weights on the two classes, measured once."""
    data = tmp_path / "data" / "colours"
    convert("folder", source_of(tmp_path / "source" / "colours"), data, workers=1, progress=False)
    run = tmp_path / "run"
    settings = {
        "run_dir": str(run), "data": {"name": "colours", "root": str(data), "reader": "arrays", "workers": 1},
        "method": {"name": "random_weights"}, "optim": {"batch_size": 4},
    }  # fmt: skip
    assert train(config.validate(config.Config, settings)) == 0
    assert top1(evaluate(run, *KNN)) == 100
    return run


def top1(outcome):
    code, records = outcome
    assert code == 0
    [value] = [record["value"] for record in records if record["name"] == "knn1_top1"]
    return value


def stored(run):
    return [record for record in results.read(run / "results.json") if record["name"] == "knn1_top1"]


def test_what_has_not_changed_is_taken_from_the_file(run, capsys):
    before = (run / "results.json").read_bytes()
    assert top1(evaluate(run, *KNN)) == 100
    assert (run / "results.json").read_bytes() == before and "already" in capsys.readouterr().err


def test_features_that_another_process_has_replaced_are_not_measured(run, monkeypatch):
    """Between the look whether they are fresh and the reading, hours may lie."""
    fresh = command._fresh_features

    def replaced(context, split):
        path = fresh(context, split)
        old = read_features(path)
        write_features(path, old.features, old.labels, old.image_ids, old.metadata | {"transform": "another"})
        return path

    monkeypatch.setattr(command, "_fresh_features", replaced)
    with pytest.raises(UserError, match=r"train\.safetensors: another process has written other features in"):
        evaluate(run, ["knn"], ["knn.k=[3]"])
    monkeypatch.undo()
    assert evaluate(run, ["knn"], ["knn.k=[3]"])[0] == 0


def test_tensorboard_has_the_results_beside_the_hyperparameters(run):
    """Also of a run that takes no step. What is held out of the training split is no result."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import metadata

    assert evaluate(run, ["knn"], ["knn.k=[3]"], 0.5)[0] == 0
    board = EventMultiplexer().AddRunsFromDirectory(str(run)).Reload()
    assert board.Runs()["tensorboard/results"]["scalars"] == ["colours-test/knn1_top1", "colours-test/knn1_top5"]
    [event] = board.Scalars("tensorboard/results", "colours-test/knn1_top1")
    assert (event.step, event.value) == (0, 100)
    about = board.SummaryMetadata("tensorboard/results", "colours-test/knn1_top1").summary_description
    assert about == stored(run)[0]["protocol"]
    assert metadata.SESSION_START_INFO_TAG in board.Runs()["tensorboard"]["tensors"]


def test_another_training_split_is_measured_anew(run, tmp_path):
    """The test split stays as it was, to the bit."""
    shutil.rmtree(tmp_path / "source")
    data = tmp_path / "data" / "colours"
    test_split = (data / "test.beton").read_bytes()
    shutil.rmtree(data)
    convert(
        "folder", source_of(tmp_path / "source" / "colours", blue="red", red="blue"), data, workers=1, progress=False
    )
    assert (data / "test.beton").read_bytes() == test_split
    assert top1(evaluate(run, *KNN)) == 0
    assert [record["value"] for record in stored(run)] == [100, 0], "both are true, of their training splits"
    assert len({record["train_data"] for record in stored(run)}) == 2


def test_another_name_of_a_class_is_extracted_anew(run, tmp_path):
    data = tmp_path / "data" / "colours"
    path = data / "dataset.json"
    path.write_text(path.read_text().replace('"blue"', '"azure"'))
    assert top1(evaluate(run, ["knn"], ["knn.k=[1]", "knn.precision=fp64"])) == 100
    assert read_features(run / "features" / "colours-test.safetensors").classes == ["azure", "red"]


def test_another_version_of_an_evaluator_is_measured_anew(run, monkeypatch):
    monkeypatch.setattr(knn, "VERSION", knn.VERSION + 1)
    monkeypatch.setattr(knn, "run", lambda *_: {"knn1_top1": 50.0})
    assert top1(evaluate(run, *KNN)) == 50
    assert [(record["version"], record["value"]) for record in stored(run)] == [(1, 100), (2, 50)]


def test_another_transform_is_measured_anew_and_recorded_beside(run):
    assert top1(evaluate(run, ["knn"], ["knn.k=[1]", "data.image_size=16"])) == 100
    sizes = [re.search(r"crop (\d+)", record["transform"])[1] for record in stored(run)]
    assert sizes == ["32", "16"]
    assert (
        read_features(run / "features" / "colours-test.safetensors")
        .metadata["transform"]
        .startswith("short side to 16, centre crop 16")
    )


def test_records_of_before_are_read_and_replaced_when_measured_again(run):
    path = run / "results.json"
    old = [{k: v for k, v in record.items() if k not in LATER_FIELDS} for record in json.loads(path.read_text())]
    path.write_text(json.dumps([record | {"value": 1.0} for record in old]))
    assert [record["value"] for record in stored(run)] == [1] and "knn1_top1" in results.table(stored(run))
    assert top1(evaluate(run, *KNN)) == 100, "nobody knows which training split the old number is of"
    assert [record["value"] for record in stored(run)] == [100]
    assert len(results.read(path)) == len(old)


def test_a_relative_place_of_the_images_is_named_with_where_it_begins(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "run", "knn", "knn.k=[1]", "data.root=colours"]) == 2
    assert f"no dataset.json in it, looked for from {tmp_path}; set data.root, or" in capsys.readouterr().err
    assert cli.main(["evaluate", "run", "knn", "knn.k=[1]", "data.root=data/colours"]) == 0


# ---------------------------------------------------------------------------------------------------- sizes


def tree_of(run, **data):
    return {
        "run_dir": str(run), "data": {"name": "colours", "root": "none"} | data, "method": {"name": "simclr"},
        "views": {"groups": [{"num": 2, "size": 24}, {"num": 2, "size": 16}]},
    }  # fmt: skip


def test_images_are_evaluated_at_the_size_of_the_largest_views():
    assert config.overridden(tree_of("run"), []).data.image_size == 24
    assert config.overridden(tree_of("run", image_size=32), []).data.image_size == 32
    assert config.overridden(tree_of("run"), ["data.image_size=16"]).data.image_size == 16
    tree = tree_of("run")
    del tree["views"]["groups"][0]["size"]
    assert config.overridden(tree, []).data.image_size == 32, "that of the views of groups[0]"
    with pytest.raises(UserError, match=r"data\.eval_resize"):
        config.overridden(tree_of("run", eval_resize=20), [])


def test_a_size_that_no_view_had_is_said(run, capsys):
    path = run / "config.yaml"
    assert "evaluated at" not in capsys.readouterr().err
    settings = config.load(path, ["data.image_size=32", "views.groups=[{size: 24}]", f"run_dir={run}-other"])
    assert train(settings) == 0
    other = f"{run}-other"
    assert cli.main(["evaluate", other, *KNN[0], *KNN[1]]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "evaluated at" in line)
    advised = re.search(r"data\.image_size=\d+", line)[0]
    assert "32 px" in line and advised == "data.image_size=24"
    assert cli.main(["evaluate", other, *KNN[0], *KNN[1], advised]) == 0
    assert "evaluated at" not in capsys.readouterr().err


def test_a_vision_transformer_is_tried_at_the_size_of_evaluation(run):
    vit = ["backbone.name=timm/vit_tiny_patch16_224", "method.name=supervised", "views.groups=[{size: 224}]"]
    settings = config.load(run / "config.yaml", [*vit, "data.image_size=40"])
    with pytest.raises(UserError, match=r"data\.image_size: images in evaluation of 40 px do not fit"):
        derive(settings, RankInfo())
    assert derive(config.load(run / "config.yaml", [*vit, "data.image_size=224"]), RankInfo())


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (1, ["optim.batch_size=1"], r"optim\.batch_size = 1: .* give 2 or more"),  # maps of one pixel at 32 px
    ],
)
def test_what_the_ranks_would_refuse_is_refused_before_they_start(run, world, overrides, message):
    resnet = ["backbone.name=resnet18", "method.name=supervised"]
    settings = config.load(run / "config.yaml", [*resnet, *overrides])
    with pytest.raises(UserError, match=message):
        derive(settings, RankInfo(0, world, 0, world))
    more = ["optim.batch_size=2"] if world == 1 else []
    assert derive(config.load(run / "config.yaml", [*resnet, *overrides, *more]), RankInfo())
