"""Evaluation and extraction of data sets that lack labels or splits; every advice about splits is obeyed."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from ssl_dist import cli, config, evaluators, results
from ssl_dist.convert.command import convert
from ssl_dist.data import file_names, labels
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.results import suggestion
from ssl_dist.run.blueprint import derive
from ssl_dist.storage.features import read_features
from ssl_dist.train import online_knn, online_probe
from ssl_dist.train.loop import train
from tests.make_images import save

COUNTS = {"train/blue": 20, "train/red": 20, "test/blue": 18, "test/red": 18, "unlabeled": 36}
WITHOUT_LABELS = ["retrieval", "clusters", "embedding"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of random weights, on a data set of three splits."""
    root = tmp_path_factory.mktemp("splits")
    generator = np.random.default_rng(0)
    for folder, count in COUNTS.items():
        for i in range(count):
            save(root / "source" / folder / f"{i:02}.png", generator.integers(0, 256, (32, 32, 3), np.uint8))
    convert("folder", root / "source", root / "data", name="photos", workers=1, progress=False)
    settings = {
        "run_dir": str(root / "a run"), "data": {"root": str(root / "data"), "reader": "arrays", "workers": 1},
        "method": {"name": "random_weights"}, "optim": {"batch_size": 4},
    }  # fmt: skip
    assert train(config.validate(config.Config, settings)) == 0
    return root / "a run"


@pytest.fixture
def data(run, tmp_path):
    """The same data set with some of its splits only: the word that takes it."""

    def with_splits(*splits):
        root = tmp_path / "-".join(splits)
        shutil.copytree(run.parent / "data", root)
        tree = json.loads((root / "dataset.json").read_text())
        tree["splits"] = {split: record for split, record in tree["splits"].items() if split in splits}
        (root / "dataset.json").write_text(json.dumps(tree))
        return f"data.root={root}"

    return with_splits


@pytest.fixture
def refused(run, capsys):
    def one_line(verb, *words):
        capsys.readouterr()
        assert cli.main([verb, str(run), *words]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    return one_line


def obeyed(line, *words):
    """The commands that the message gives, or else its options behind `words`, one after the other; each works."""
    commands = [shlex.split(text)[1:] for text in re.findall(r"`(ssl-dist .*?)`", line)]
    if not commands:
        commands = [
            [*words, *shlex.split(option)] for option in re.findall(r"--split [\w']+(?: --split \w+)*", line)[1:]
        ]
    for command in commands:
        assert cli.main(command) == 0, command
    return commands


@pytest.mark.parametrize(
    ("splits", "words", "says", "advised"),
    [
        (["unlabeled"], ["knn"], "knn: needs labels, and .* no labelled split to learn from .train., only unlabeled",
         [*WITHOUT_LABELS, "--split", "unlabeled"]),
        (["unlabeled", "test"], ["probe", "knn"], "probe: needs labels", [*WITHOUT_LABELS, "--split", "test"]),
        (["test"], ["knn", "retrieval", "retrieval.queries=4"], "only test",
         [*WITHOUT_LABELS, "retrieval.queries=4", "--split", "test"]),
        (["unlabeled"], ["retrieval", "--validation", "0.1"], "--validation: needs labels", ["--split", "unlabeled"]),
        (["train"], ["retrieval", "knn", "knn.k=[1]", "retrieval.k=[1]"], "knn: learns from train, and .*no labelled",
         ["knn", "knn.k=[1]", "--validation", "0.1"]),
        (["unlabeled", "train"], ["knn"], "knn: learns from train, and", ["--validation", "0.1"]),
        (["train", "test"], ["knn", "--split", "train"], "--split train gives the same", ["--validation", "0.1"]),
        (["unlabeled", "train", "test"], ["knn", "--split", "unlabeled", "data.subset={per_class: 3}"],
         "split 'unlabeled' has none", [*WITHOUT_LABELS, "--split", "unlabeled"]),
    ],
)  # fmt: skip
def test_a_refusal_names_the_command_that_works(run, data, refused, splits, words, says, advised):
    place = data(*splits)
    line = refused("evaluate", *words, place)
    assert re.search(says, line), line
    [command] = obeyed(line)
    assert [word for word in command if word in advised] == advised and place in command
    assert "data.subset={per_class: 3}" not in command


def test_a_labelled_split_is_measured_by_what_the_training_split_teaches(run, data, tmp_path):
    """As the test split would be, here the same images under the name of the other one."""
    place = data("train", "test")
    root = Path(place.partition("=")[2])
    text = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(text.replace('"test": {', '"val": {'))
    (root / "test.beton").rename(root / "val.beton")
    (root / "test-files.txt").rename(root / "val-files.txt")
    for words in ([data("train", "test", "unlabeled")], [place, "--split", "val"]):
        assert cli.main(["evaluate", str(run), "knn", "knn.k=[3]", *words]) == 0
    records = [r for r in results.read(run / "results.json") if r["name"] == "knn3_top1"]
    assert [(r["split"], r["value"]) for r in records] == [("test", records[0]["value"]), ("val", records[0]["value"])]
    assert len({r["protocol"] for r in records}) == 1 and "alone" not in records[0]["protocol"]


def test_a_split_that_is_not_there(run, data, refused):
    place = data("unlabeled", "test")
    line = refused("evaluate", "retrieval", place, "--split", "photos")
    assert "holds no such split; give --split unlabeled or --split test" in line
    assert len(obeyed(line, "evaluate", str(run), "retrieval", place)) == 2
    line = refused("extract", place, "--split", "train")
    [command] = obeyed(line.replace("'train'", "--split train"), "extract", str(run), place)
    assert command[-4:] == ["--split", "unlabeled", "--split", "test"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["data.subset={per_class: 3}"], []),
        (["--search", "retrieval.seed=[1,2]"], []),
        (["--validation", "0.1"], ["--split", "unlabeled"]),
    ],
)
def test_options_of_another_split_beside_one_that_stands_alone(run, refused, words, remedy):
    line = refused("evaluate", "retrieval", "--split", "unlabeled", *words)
    assert words[0].partition("=")[0] in line and re.search(r"leave (it|one of the two) out", line)
    assert cli.main(["evaluate", str(run), "retrieval", *(remedy or ["--split", "unlabeled"])]) == 0


def test_of_another_data_set_the_name_may_be_left_out(run, data, tmp_path):
    """A folder of other photos, by an encoder that was trained on these."""
    root = data("unlabeled").partition("=")[2]
    tree = json.loads((path := Path(root) / "dataset.json").read_text())
    path.write_text(json.dumps(tree | {"name": "others"}))
    for words in ([], ["data.name=null"], ["data.name=others"]):
        assert cli.main(["extract", str(run), f"data.root={root}", *words, "--out", str(tmp_path / "features")]) == 0
        assert (tmp_path / "features" / "others-unlabeled.safetensors").exists()
    assert cli.main(["extract", str(run), f"data.root={root}", "data.name=photos"]) == 2


def test_extract_takes_the_splits_that_there_are(run, data, tmp_path, capsys):
    for splits, taken in (
        (["unlabeled"], ["unlabeled"]), (["unlabeled", "train"], ["train"]),
        (["unlabeled", "train", "test"], ["train", "test"]),
    ):  # fmt: skip
        out = tmp_path / f"features-{len(splits)}"
        assert cli.main(["extract", str(run), data(*splits), "--out", str(out)]) == 0
        assert [line.rpartition("-")[2] for line in capsys.readouterr().out.split()] == [
            f"{split}.safetensors" for split in taken
        ]
        for split in taken:
            files = file_names.path_of(out, f"photos-{split}").read_text().splitlines()
            assert len(files) == len(read_features(out / f"photos-{split}.safetensors")) and files[3].endswith("03.png")


def test_a_training_without_labels_ends_with_the_command_that_measures_it(data, tmp_path, capsys):
    own = tmp_path / "own"
    settings = {
        "run_dir": str(own), "data": {"root": data("unlabeled").partition("=")[2], "reader": "arrays", "workers": 1},
        "method": {"name": "random_weights"}, "optim": {"batch_size": 4},
    }  # fmt: skip
    assert train(config.validate(config.Config, settings)) == 0
    lines = capsys.readouterr().err.splitlines()
    advised = shlex.split(lines[lines.index(f"{own}: complete; next") + 1])
    assert advised[:3] == ["ssl-dist", "evaluate", str(own)]
    assert tuple(advised[3:-2]) == tuple(WITHOUT_LABELS) == suggestion.WITHOUT_LABELS
    of_transformers = "attention"  # which is not advised for every run
    assert sorted([*WITHOUT_LABELS, of_transformers]) == [
        name for name in evaluators.names() if evaluators.works_without_labels(name)
    ]
    assert advised[-2:] == ["--split", "unlabeled"]


@pytest.mark.parametrize(
    ("splits", "words", "says", "number", "alternatives"),
    [
        (
            ["unlabeled"],
            ["method={name: supervised}", "views.num=1"],
            "supervised needs labels, and .* no such split",
            2,
            False,
        ),
        (
            ["unlabeled", "test"],
            ["method={name: supervised}", "views.num=1"],
            "no such split; give data.split=test",
            1,
            True,
        ),
        (
            ["unlabeled", "train"],
            ["method={name: supervised}", "views.num=1", "data.split=unlabeled"],
            "this split has none",
            1,
            True,
        ),
        (["unlabeled", "test"], ["data.split=photos"], "set data.split=unlabeled or data.split=test", 2, True),
        (["test"], [], "data.split = 'train': .* no such split; set data.split=test", 1, True),
        (["unlabeled"], ["data.subset={per_class: 3}"], "per_class needs labels", 2, False),
        (["unlabeled"], ["method.options={labelled: 0.5}"], "no label; set method.options.labelled=0", 1, True),
        (["unlabeled"], ["log.knn_every_epochs=1"], "holds no labelled split train", 1, True),
        (["unlabeled"], ["log.probe_every_epochs=1"], "unlabeled of .*, which is trained on, has none", 1, True),
    ],
)
def test_a_training_is_told_what_can_be_trained_on(data, tmp_path, splits, words, says, number, alternatives):
    fixed = [data(*splits), "data.name=null", f"run_dir={tmp_path / 'run'}", "data.reader=arrays", "optim.batch_size=4"]

    def plan(*more):
        plan = derive(config.load("configs/digits/relational-conv4.yaml", [*fixed, *words, *more]), RankInfo())
        if plan.config.log.knn_every_epochs is not None:
            online_knn.chosen_images(plan)
        if plan.config.log.probe_every_epochs is not None:
            online_probe.chosen_images(plan)

    with pytest.raises(UserError, match=says) as caught:
        plan()
    text = str(caught.value).rpartition("; ")[2]
    advised = re.findall(r"`([^`]+)`", text) + re.findall(r"(?:data|method|log|views)\.[\w.]+=\w+", text)
    for each in [[word] for word in advised] if alternatives else [advised]:
        plan(*each)
    assert len(advised) == number


def test_a_split_without_labels_alone(run, data, capsys):
    """Numbers, what the record says of it, pictures and lists, and the page."""
    assert cli.main(["evaluate", str(run), *WITHOUT_LABELS, data("unlabeled")]) == 0
    captured = capsys.readouterr()
    assert "split unlabeled of photos stands alone" in captured.err and captured.out.count("has no labels") == 3
    records = [record for record in results.read(run / "results.json") if record["split"] == "unlabeled"]
    assert not [record["name"] for record in records if "top" in record["name"]] and len(records) == 8
    for record in records:
        assert record["protocol"].endswith("; within split unlabeled alone, which has no labels: no accuracies")
        assert "class" not in record["protocol"] and "train" not in record["protocol"]
    made = sorted((run / "figures").glob("photos-unlabeled-*"))
    assert [path.name.removeprefix("photos-unlabeled-") for path in made] == [
        "clusters-images.png", "clusters.csv", "clusters.html", "embedding-images.png", "embedding-pca.png",
        "embedding-tsne.png", "retrieval-nearest.csv", "retrieval-nearest.png",
    ]  # fmt: skip
    rows = (run / "figures" / "photos-unlabeled-clusters.csv").read_text().splitlines()
    assert rows[0] == "image_id,file,cluster" and rows[8].startswith("7,unlabeled/07.png,") and len(rows) == 37
    assert cli.main(["evaluate", str(run), *WITHOUT_LABELS, data("unlabeled", "test"), "--split", "unlabeled"]) == 0
    assert capsys.readouterr().err.count(f"in {run / 'results.json'} already") == 3
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "retrieval_nearest_cosine" in page
    assert "figures/photos-unlabeled-clusters.html" in page and "figures/photos-unlabeled-retrieval-nearest.csv" in page


def test_labels_of_a_file_are_those_of_the_split_that_is_looked_at(run, refused, tmp_path):
    """Ids of train are none of unlabeled, which has fewer images."""
    files = {split: tmp_path / f"{split}.csv" for split in ("train", "unlabeled")}
    for split, count in (("train", 40), ("unlabeled", 36)):
        files[split].write_text(labels.text(np.arange(count), np.arange(count)[None] % 4))
    looking_at = {"train": [], "unlabeled": ["--split", "unlabeled"]}
    line = refused("evaluate", "clusters", *looking_at["unlabeled"], f"clusters.labels={files['train']}")
    assert f"{files['train']} line 38: image 36 is not in the split's 0..35; give labels of this split" in line
    for split, words in looking_at.items():
        assert cli.main(["evaluate", str(run), "clusters", *words, f"clusters.labels={files[split]}"]) == 0
