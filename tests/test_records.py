"""results.json: merging, what is refused, and the table."""

import json
import os

import numpy as np
import pytest

from ssl_dist import results
from ssl_dist.errors import UserError
from ssl_dist.storage.features import Features
from tests import kills, ranks

METADATA = {
    "classes": "[]",
    "dataset": "digits",
    "split": "test",
    "transform": "centre crop",
    "data": "cd" * 32,
    "train_data": "ef" * 32,
    "checkpoint": "ab" * 32,
    "step": "40",
    "layer": "output",
    "method": "relational",
    "backbone": "conv4",
}


def measured(values, protocol="kNN", **changes):
    test = Features(np.zeros((1, 1), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64), METADATA | changes)
    return results.make_records(values, protocol, test.metadata, seed=3, options={"k": [20]}, version=1)


def test_a_record_says_what_the_number_means():
    (record,) = measured({"knn20_top1": 97.5})
    time = record.pop("time")
    assert time.endswith("+00:00") and len(time) == len("2026-01-01T00:00:00+00:00")
    assert record == {
        "name": "knn20_top1",
        "value": 97.5,
        "protocol": "kNN",
        "options": {"k": [20]},
        "version": 1,
        "dataset": "digits",
        "split": "test",
        "data": "cd" * 32,
        "train_data": "ef" * 32,
        "transform": "centre crop",
        "layer": "output",
        "seed": 3,
        "method": "relational",
        "backbone": "conv4",
        "checkpoint": "ab" * 32,
        "step": 40,
    }


def test_a_repeated_measurement_replaces_the_old_one(tmp_path):
    path = tmp_path / "run" / "results.json"
    assert results.read(path) == []
    results.add(path, measured({"knn20_top1": 1.0, "knn200_top1": 2.0}))
    results.add(path, measured({"knn20_top1": 3.0}))
    assert [(r["name"], r["value"]) for r in json.loads(path.read_text())] == [
        ("knn20_top1", 3.0),
        ("knn200_top1", 2.0),
    ]
    different = [
        *measured({"knn20_top1": 4.0}, protocol="another"),
        *measured({"knn20_top1": 5.0}, dataset="cifar10"),
        *measured({"knn20_top1": 6.0}, split="train"),
        *measured({"knn20_top1": 7.0}, checkpoint="cd" * 32),
        *measured({"knn5_top1": 8.0}),
        *measured({"knn20_top1": 9.0}, backbone="conv5"),
    ]
    merged = results.add(path, different)
    assert [r["value"] for r in merged] == [3.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert results.read(path) == merged
    assert os.listdir(path.parent) == ["results.json"]


def add_one_by_one(rank, size, path):
    for number in range(10):
        results.add(path, measured({f"name-{rank}-{number}": float(number)}))


def test_processes_at_once_lose_none_of_their_records(tmp_path):
    path = tmp_path / "run" / "results.json"
    ranks.launch(add_one_by_one, 8, tmp_path, path)
    assert {record["name"] for record in results.read(path)} == {f"name-{r}-{n}" for r in range(8) for n in range(10)}
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.slow
def test_old_or_new_records_at_every_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for before in ([], ["a", "b"]):
        if before:
            results.add(prepared / "results.json", measured(dict.fromkeys(before, 1.0)))
        names = []
        for run in kills.every_kill(
            prepared, tmp_path, lambda run: results.add(run / "results.json", measured({"c": 2.0}))
        ):
            names.append([record["name"] for record in results.read(run / "results.json")])
            results.add(run / "results.json", measured({"c": 2.0}))
            assert [record["name"] for record in results.read(run / "results.json")] == [*before, "c"]
            assert os.listdir(run) == ["results.json"]
        assert names == sorted(names, key=len) and names[0] == before and names[-1] == [*before, "c"]


@pytest.mark.parametrize("content", ["{", "{}", '[{"name": "x"}]', "[1]", "\xff"])
def test_a_damaged_file_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        results.add(path, measured({"knn20_top1": 1.0}))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == content.encode("latin-1")


def test_incomplete_records_are_no_results(tmp_path):
    (record,) = measured({"knn20_top1": 1.0})
    for wrong in ({k: v for k, v in record.items() if k != "seed"}, record | {"value": "1"}, record | {"step": None}):
        with pytest.raises(ValueError, match="a record needs the fields name, value"):
            results.add(tmp_path / "results.json", [wrong])


def test_the_folder_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        results.add(tmp_path / "file" / "results.json", measured({"knn20_top1": 1.0}))


def test_table():
    shown = [
        *measured({"knn20_top1": 97.514, "knn20_top5": 100.0}),
        *measured(
            {"logistic_top1": 8.0, "logistic_converged": 1.0}, protocol="linear", method="random_weights", step="0"
        ),
    ]
    lines = results.table(shown).splitlines()
    assert lines[0].split() == ["method", "backbone", "step", "data", "set", "split", "result", "value"]
    assert lines[2].split() == ["relational", "conv4", "40", "digits", "test", "knn20_top1", "97.51", "[1]"]
    assert lines[4].split() == ["random_weights", "conv4", "0", "digits", "test", "logistic_top1", "8.00", "[2]"]
    assert lines[5:] == ["", "[1] kNN", "[2] linear"]
    assert (
        len(
            {
                line.index(number) + len(number)
                for line, number in zip(lines[2:5], ("97.51", "100.00", "8.00"), strict=True)
            }
        )
        == 1
    )
    assert "NOT CONVERGED" in results.table(measured({"logistic_converged": 0.0}))
    assert results.table([]) == "no results"


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [(64.044, None, "64.04"), (0.17352, None, "0.1735"), (0, None, "0.00"), (1, None, "1.00"), (100, None, "100.00"),
     (52.36, 0.204, "52.36 ± 0.20"), (0.17352, 0.00318, "0.1735 ± 0.0032"), (-0.0123, None, "-0.0123")],
)  # fmt: skip
def test_scores_below_one_have_four_decimals(value, std, text):
    assert results.number(value, std) == text
