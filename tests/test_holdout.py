"""What an evaluation may learn from and is measured on: subsets, a held-out part, a search, on any number of ranks."""

import contextlib
import io
import json
import os

import numpy as np
import pytest

from ssl_dist import cli, results
from ssl_dist.config import ClassSubset
from ssl_dist.data import plan
from ssl_dist.data.readers import Dataset
from ssl_dist.evaluate.command import evaluate
from ssl_dist.evaluators import knn, logistic, probe
from ssl_dist.storage.features import read_features
from tests import ranks
from tests.test_transfer import pretrained


@pytest.fixture(scope="module")
def measured_run(digits, tmp_path_factory):
    """A run with its features files."""
    run = pretrained(digits, tmp_path_factory.mktemp("runs") / "random")
    assert evaluate(run, ["knn"], ["knn.k=[7]"])[0] == 0
    return run


@pytest.fixture
def run(measured_run):
    (measured_run / "results.json").unlink(missing_ok=True)
    return measured_run


def values(records, split):
    return {record["name"]: record["value"] for record in records if record["split"] == split}


def halves(run, share, ids=None):
    """Features of the held-out part and of the rest, by what is documented."""
    whole = read_features(run / "features" / "digits-train.safetensors")
    ids = whole.image_ids if ids is None else ids
    held_out_ids = plan.held_out(ids, whole.labels[ids], share, seed=0)
    return whole.subset(held_out_ids, "held"), whole.subset(np.setdiff1d(ids, held_out_ids))


def test_validation_measures_a_part_of_the_training_split(run):
    validation, rest = halves(run, 0.25)
    code, records = evaluate(run, ["knn", "logistic"], ["knn.k=[5]"], validation=0.25)
    assert code == 0 and {record["split"] for record in records} == {"train[held out 25%]"}
    expected = knn.run(rest, validation, knn.Options(k=[5])) | logistic.run(rest, validation, logistic.Options())
    assert values(records, "train[held out 25%]") == expected
    assert results.read(run / "results.json") == records
    assert {record["data"] for record in records} == {validation.metadata["data"]}


def test_validation_leaves_the_test_split_alone(digits, tmp_path, monkeypatch):
    run = pretrained(digits, tmp_path / "run")
    opened = []
    open_split = Dataset.open
    monkeypatch.setattr(Dataset, "open", lambda self, split, *a: (opened.append(split), open_split(self, split, *a))[1])
    assert evaluate(run, ["knn"], ["knn.k=[5]"], validation=0.1)[0] == 0
    assert opened and set(opened) == {"train"}
    assert os.listdir(run / "features") == ["digits-train.safetensors"]
    assert not (run / "figures").exists(), "pictures are of the test split"


def test_a_search_chooses_on_the_held_out_part_and_tests_once(run, monkeypatch):
    validation, rest = halves(run, 0.1)
    train, test = (read_features(run / "features" / f"digits-{split}.safetensors") for split in ("train", "test"))
    grid = [0.003, 0.03, 3.0, 30.0]
    tried = [logistic.run(rest, validation, logistic.Options(c=c))["logistic_top1"] for c in grid]
    best = grid[tried.index(max(tried))]
    tests = []
    original = logistic.run
    monkeypatch.setattr(
        logistic,
        "run",
        lambda a, b, *more: (tests.append(b.metadata["split"]), original(a, b, *more))[1],
    )
    code, records = evaluate(run, ["logistic", "knn"], ["knn.k=[3]"], searched=[f"logistic.c={json.dumps(grid)}"])
    assert code == 0 and tests == [*["train[held out 10%]"] * len(grid), "test"]
    top1s = [record for record in records if record["name"] == "logistic_top1"]
    assert [record["value"] for record in top1s[:-1]] == tried
    assert top1s[-1]["value"] == original(train, test, logistic.Options(c=best))["logistic_top1"]
    assert top1s[-1]["options"]["c"] == best
    assert top1s[-1]["protocol"].endswith(
        f"; logistic.c={json.dumps(best)} chosen of logistic.c={json.dumps(grid)} by top-1 on train[held out 10%]"
    )
    assert values(records, "test")["knn3_top1"] == knn.run(train, test, knn.Options(k=[3]))["knn3_top1"]
    stored = results.read(run / "results.json")
    assert stored == records and len({record["protocol"] for record in stored}) == len(grid) + 2
    assert evaluate(run, ["logistic"], [], searched=[f"logistic.c={json.dumps(grid)}"])[1] == [
        record for record in records if record["name"].startswith("logistic")
    ]
    assert len(tests) == len(grid) + 1, "what is known is not measured again"


def test_options_that_the_protocol_does_not_name_are_distinguished(run):
    _, records = evaluate(run, ["knn"], ["knn.k=[5]"], searched=["knn.memory_mb=[8,9]"], validation=0.5)
    stored = results.read(run / "results.json")
    assert len(records) == len(stored) == 2 * 3
    assert [record["options"]["memory_mb"] for record in stored if record["name"] == "knn5_top1"] == [8, 9, 8], "a tie"


def test_subsets(run, tmp_path):
    train, test = (read_features(run / "features" / f"digits-{split}.safetensors") for split in ("train", "test"))
    ids = plan.per_class(train.image_ids, train.labels, 20, 5)
    _, records = evaluate(run, ["knn"], ["knn.k=[5]", "data.subset={per_class: 20, start: 5}"])
    assert values(records, "test") == knn.run(train.subset(ids), test, knn.Options(k=[5]))
    assert records[0]["protocol"].endswith("; fitted on 20 images a class from number 5 of train")
    assert not any(results.learned_from_all_images(record) for record in records)
    _, of_a_list = evaluate(run, ["knn"], ["knn.k=[5]", f"data.subset={_list(tmp_path / 'a.txt', ids)}"])
    assert values(of_a_list, "test") == values(records, "test")
    assert "; fitted on the 200 images of a.txt (" in of_a_list[0]["protocol"]
    swapped = np.sort(np.append(ids[1:], np.setdiff1d(train.image_ids, ids)[0]))
    _, of_another_list = evaluate(run, ["knn"], ["knn.k=[5]", f"data.subset={_list(tmp_path / 'a.txt', swapped)}"])
    assert of_another_list[0]["protocol"] != of_a_list[0]["protocol"], "another file of the same name"
    validation, rest = halves(run, 0.1, ids)
    _, records = evaluate(run, ["knn"], ["knn.k=[5]", "data.subset={per_class: 20, start: 5}"], validation=0.1)
    assert (
        values(records, "train[held out 10%]") == knn.run(rest, validation, knn.Options(k=[5]))
        and len(validation) == 20
    )


def test_validation_on_chosen_images(run, tmp_path):
    """SFRIK measures on a second part of the training images: those after the ones that are learned from."""
    train = read_features(run / "features" / "digits-train.safetensors")
    learnt, measured = (plan.per_class(train.image_ids, train.labels, 30, start) for start in (0, 30))
    words = ["evaluate", str(run), "knn", "knn.k=[5]", "data.subset={per_class: 30}", "--validation"]
    name = "train[held out 30 images a class from number 30]"
    expected = knn.run(train.subset(learnt), train.subset(measured, "held"), knn.Options(k=[5]))
    assert cli.main([*words, "{per_class: 30, start: 30}"]) == 0
    assert values(results.read(run / "results.json"), name) == expected
    assert cli.main([*words, str(_list(tmp_path / "ids.txt", measured))]) == 0
    of_list = [r for r in results.read(run / "results.json") if "held out the 300 images of ids.txt" in r["split"]]
    assert {record["name"]: record["value"] for record in of_list} == expected
    rest = np.setdiff1d(train.image_ids, measured)
    _, records = evaluate(run, ["knn"], ["knn.k=[5]"], validation=ClassSubset(per_class=30, start=30))
    assert values(records, name) == knn.run(train.subset(rest), train.subset(measured, "held"), knn.Options(k=[5]))


def _list(path, ids):
    path.write_text("".join(f"{i}\n" for i in ids))
    return path


@pytest.mark.slow
def test_a_probe_is_searched_over_like_the_others(run):
    chosen = ["probe.epochs=1", "probe.batch_size=64"]
    code, records = evaluate(run, ["probe"], chosen, searched=["probe.lr=[1e-5,0.05]"], validation=0.2)
    assert code == 0
    tops = [record for record in records if record["name"] == "probe_top1"]
    assert [record["split"] for record in tops] == ["train[held out 20%]"] * 2 + ["test"]
    assert tops[0]["value"] < tops[1]["value"] and tops[2]["options"]["lr"] == 0.05
    validation, rest = halves(run, 0.2)
    learnt = {tuple(map(int, path.read_text().split())) for path in run.glob("evaluations/*/train_ids.txt")}
    assert learnt == {tuple(rest.image_ids)}
    assert len(list((run / "evaluations").iterdir())) == 3
    assert tops[0]["value"] * len(validation) / 100 == pytest.approx(round(tops[0]["value"] * len(validation) / 100))
    _, alone = evaluate(run, ["probe"], [*chosen, "probe.lr=0.05"])
    assert alone[0]["value"] == tops[2]["value"] and probe.protocol(probe.Options(epochs=1)) != alone[0]["protocol"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--validation", "1.5"], "--validation 1.5: give the share"),
        (["--validation", "0.1", "data.subset={per_class: 1}"], "--validation 0.1: class 0 has one image"),
        (["--validation", "yes"], "--validation yes: give the share"),
        (["--validation", "null"], "--validation null: give the share"),
        (["--validation", "[1]"], "--validation [1]: give the share"),
        (["--validation", "{per_class: 0}"], "--validation {per_class: 0}: images.per_class = 0: input"),
        (["--validation", "{per_class: 9999}"], "--validation: class 0 has"),
        (["--validation", "{per_class: 2}", "data.subset={per_class: 1}"], "--validation: 10 of its images are"),
        (["--search", "knn.kk=[1]"], "unknown key knn.kk = 1"),
        (["data.subset=/nowhere.txt"], "data.subset: /nowhere.txt: cannot be read"),
        (["data.subset={per_class: 100000}"], "data.subset: class 0 has"),
        (["data.subset=3"], "data.subset = 3"),
        (["data.subset="], "tf32, data.subset can be set here"),
        (["data.limit=5"], "tf32, data.subset can be set here"),
    ],
)
def test_mistakes_are_one_line(run, capsys, words, line):
    assert cli.main(["evaluate", str(run), "knn", *words]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and line in stderr
    assert not (run / "results.json").exists()


def in_ranks(rank, size, run):
    """Exit code and output of a rank's command."""
    words = ["evaluate", str(run), "knn", "logistic", "logistic_sgd"]
    words += ["--search", "knn.k=[[1],[5],[20]]", "logistic.c=[0.1,1]"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        return cli.main(words), output.getvalue()


@pytest.mark.slow
def test_any_number_of_ranks_measures_the_same(digits, tmp_path):
    """355 test images, which neither 2 nor 3 divides."""
    measured = {}
    for size in (1, 2, 3):
        run = pretrained(digits, tmp_path / str(size))
        codes, outputs = zip(*ranks.launch(in_ranks, size, tmp_path, run), strict=True)
        assert set(codes) == {0}
        assert "".join(outputs).count("logistic_sgd_top1") == 1, "the table is printed once"
        records = results.read(run / "results.json")
        measured[size] = [(r["name"], r["split"], r["protocol"], r["value"]) for r in records]
        test = read_features(run / "features" / "digits-test.safetensors")
        assert len(test) % 2 and len(test) % 3
        measured[size, "features"] = test.rows(0, len(test))
    assert len(measured[1]) == 3 * 2 + 2 + 2 * 4 + 4 + 3
    for size in (2, 3):
        assert measured[size] == measured[1]
        np.testing.assert_allclose(measured[size, "features"], measured[1, "features"], rtol=1e-4, atol=1e-6)
