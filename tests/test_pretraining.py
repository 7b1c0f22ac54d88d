"""`ssl_dist.pretrain` and `ssl_dist.Run`: a training and its folder from a program."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

import ssl_dist
from ssl_dist import cli
from ssl_dist.errors import UserError

CONFIG = "configs/digits/relational-conv4.yaml"


@pytest.fixture(scope="module")
def told():
    return {"lines": [], "checkpoints": []}


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, told):
    folder = tmp_path_factory.mktemp("runs") / "one"
    overrides = {
        "data.root": str(digits), "data.reader": "arrays", "run_dir": folder, "optim.steps": np.int64(4),
        "log.every_steps": 2, "optim.batch_size": 16, "data.limit": 64,
    }  # fmt: skip
    return ssl_dist.pretrain(CONFIG, overrides, on_log=told["lines"].append, on_checkpoint=told["checkpoints"].append)


def test_what_is_told_and_what_is_there(run, told):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert told["lines"] == lines and [line["step"] for line in lines] == [1, 2, 4]
    assert told["checkpoints"] == sorted((run.folder / "checkpoints").glob("step-*.pt"))
    assert run.step == 4 and "relational on conv4, step 4" in repr(run)
    columns = run.metrics()
    assert columns["step"].tolist() == [1, 2, 4] and np.isfinite(columns["loss"]).all()
    assert [axes.get_ylabel() for axes in run.plot().axes] == ["loss", "accuracy"]
    assert len(run.plot("lr").axes[0].lines[0].get_xdata()) == 3
    with pytest.raises(UserError, match="has no los; it has step, epoch, loss"):
        run.plot("los")


def test_again_it_is_left_alone(run, told):
    before = len(told["lines"])
    tree = yaml.safe_load((run.folder / "config.yaml").read_text())
    again = ssl_dist.pretrain(tree, on_log=told["lines"].append)
    assert again.folder == run.folder and len(told["lines"]) == before
    ssl_dist.pretrain(run.config, {"optim.steps": 5}, on_log=told["lines"].append)
    assert run.step == 5 and [line["step"] for line in told["lines"][before:]] == [5]


def test_results_are_those_of_the_command(run, capsys):
    assert cli.main(["evaluate", str(run.folder), "knn", "knn.k=[3]"]) == 0
    values = run.evaluate("knn", overrides={"knn.k": [3]})
    assert set(values) == {"knn3_top1", "knn3_top5"}
    with pytest.raises(UserError, match="give names one by one"):
        run.evaluate(["knn"])
    assert {record["name"]: record["value"] for record in run.results()} == values
    assert run.report().read_text(encoding="utf-8").startswith("<!doctype html>")
    assert ssl_dist.load(run.folder, device="cpu").dim == 64


def test_what_a_listener_raises_ends_the_training(run, tmp_path):
    def full(line):
        raise RuntimeError("no room in the tracker")

    with pytest.raises(RuntimeError, match="no room"):
        ssl_dist.pretrain(run.config, {"run_dir": str(tmp_path / "other")}, on_log=full)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"optim\.lr"):
        ssl_dist.pretrain(CONFIG, {"optim.lr": -1})
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        ssl_dist.Run(tmp_path)
    with pytest.raises(UserError, match="settings = 3: give a config's file"):
        ssl_dist.pretrain(3)
    with pytest.raises(UserError, match=r"overrides = \[.*\]: give a dict"):
        ssl_dist.pretrain(CONFIG, ["optim.lr=1"])
    with pytest.raises(UserError, match=r"optim\.lr = \{1\}: a value of a config is a number"):
        ssl_dist.pretrain(CONFIG, {"optim.lr": {1}})
    with ThreadPoolExecutor() as threads, pytest.raises(UserError, match="in the main thread"):
        threads.submit(ssl_dist.pretrain, CONFIG, {"run_dir": str(tmp_path / "run")}).result()
    assert not (tmp_path / "run").exists()
