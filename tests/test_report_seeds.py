"""Mean and standard deviation over the seeds of runs."""

import statistics

import pytest

from ssl_dist import config, report, results
from ssl_dist.errors import UserError


def run_with(folder, seed, value, lr=1e-3, weights=None, **changes):
    record = {
        "name": "knn5_top1", "value": value, "protocol": "kNN", "options": {}, "dataset": "digits", "split": "test",
        "data": "d", "train_data": "t", "transform": "crop", "version": 1,
        "seed": seed, "method": "relational", "backbone": "conv4", "checkpoint": f"c{seed}", "step": 20,
        "time": "2030-01-01T00:00:00+00:00",
    } | changes  # fmt: skip
    folder.mkdir(exist_ok=True)
    tree = {"run_dir": str(folder), "seed": seed, "data": {"name": "digits", "root": "x"}, "optim": {"lr": lr}}
    tree["backbone"] = {"weights": weights}
    (folder / "config.yaml").write_text(config.dump(config.validate(config.Config, tree)))
    results.add(folder / "results.json", [record])
    return folder


def test_mean_and_std_over_seeds(tmp_path):
    values = [90.0, 92.5, 91.0]
    runs = [run_with(tmp_path / str(seed), seed, value) for seed, value in enumerate(values)]
    [record] = report.over_seeds(runs)
    assert record["mean"] == pytest.approx(statistics.fmean(values)) and record["seeds"] == [0, 1, 2]
    assert record["std"] == pytest.approx(statistics.stdev(values))
    text = report.table([record])
    assert "91.17 ± 1.26" in text and "[1] kNN" in text


def test_what_differs_is_not_averaged(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0), run_with(tmp_path / "b", 1, 50.0, method="random_weights")]
    run_with(tmp_path / "a", 0, 80.0, protocol="another kNN")
    records = report.over_seeds(runs)
    assert [(r["method"], r["mean"], r["std"]) for r in records] == [
        ("relational", 90.0, None), ("relational", 80.0, None), ("random_weights", 50.0, None),
    ]  # fmt: skip
    assert "±" not in report.table(records).split("\n", 2)[2]


def test_another_config_is_no_other_seed(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0), run_with(tmp_path / "b", 1, 50.0, lr=0.1)]
    assert [(r["run"], r["mean"], r["seeds"]) for r in report.over_seeds(runs)] == [("a", 90.0, [0]), ("b", 50.0, [1])]


def test_other_initial_weights_are_no_other_seed(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0, weights="a.pt"), run_with(tmp_path / "b", 1, 50.0, weights="b.pt")]
    runs.append(run_with(tmp_path / "c", 0, 40.0))
    assert [(r["run"], r["seeds"]) for r in report.over_seeds(runs)] == [("a", [0]), ("b", [1]), ("c", [0])]


def test_other_samples_are_not_averaged(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0), run_with(tmp_path / "b", 1, 50.0, data="another version")]
    assert len(report.over_seeds(runs)) == 2


def test_convergence_is_no_result(tmp_path):
    run = run_with(tmp_path / "a", 0, 1.0, name="logistic_converged")
    run_with(tmp_path / "a", 0, 90.0)
    assert [r["name"] for r in report.over_seeds([run])] == ["knn5_top1"]


def test_the_newest_checkpoint_of_a_run_counts(tmp_path):
    run = run_with(tmp_path / "a", 0, 90.0)
    run_with(tmp_path / "a", 0, 95.0, checkpoint="later", step=40, time="2030-01-02T00:00:00+00:00")
    [record] = report.over_seeds([run])
    assert (record["mean"], record["step"]) == (95.0, 40)


def test_mistakes(tmp_path):
    run = run_with(tmp_path / "a", 0, 90.0)
    with pytest.raises(UserError, match="has the seed, 0, and the config of"):
        report.over_seeds([run, run])
    with pytest.raises(UserError, match="holds no results; run `ssl-dist evaluate"):
        report.over_seeds([tmp_path / "none"])
