"""What bad input gets: one line that names the thing, the value and the remedy; exit code 2; nothing half-written."""

import json
import shutil
import subprocess
import sys

import pytest

from ssl_dist import cli

CONFIG = "configs/digits/relational-conv4.yaml"


@pytest.fixture
def fails(capsys):
    """Run a command that must be refused; returns its one line."""

    def run(*arguments):
        assert cli.main([str(a) for a in arguments]) == 2
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("error: "), stderr
        return lines[0]

    return run


def few_steps(data, run, *more):
    return [
        CONFIG, f"data.root={data}", f"run_dir={run}", "data.reader=arrays", "data.limit=32", "optim.batch_size=16",
        "optim.epochs=null", "optim.steps=2", "checkpoint.every_epochs=null", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["optim.lrr=1"], ["optim.lrr", "'lr'"]),
        (["method.name=relatonal"], ["method.name", "relatonal", "relational"]),
        (["method.options.gama=2"], ["method.options.gama", "gamma"]),
        (["method.options.aggregation=concat"], ["method.options.aggregation", "cat"]),
        (["backbone.name=conv5"], ["conv5", "conv4"]),
        (["optim.batch_size=64"], ["optim.batch_size = 64", "32 images"]),
        (["views.num=1"], ["views.num", "1"]),
        (["views.num=null"], ["views.num"]),
        (["data.split=tset"], ["tset", "train", "test"]),
        (["data.root=/nowhere"], ["/nowhere", "dataset.json", "convert"]),
        (["data.subset=/nowhere.txt"], ["data.subset", "/nowhere.txt"]),
        (["data.subset={per_class: 9999}"], ["data.subset", "9999"]),
        (["data.view_shards=2"], ["data.view_shards", "1 (1 image x 1 view shards)"]),
        (["data.image_size=4"], ["data.image_size", "4 px", "conv4"]),
        (["backbone.name=alexnet"], ["data.image_size", "32 px", "alexnet takes images of 223 to 254 px"]),
        (["backbone.zero_init_residual=true"], ["backbone.zero_init_residual", "conv4"]),
        (["optim.batch_size=1"], ["optim.batch_size = 1"]),
        (["data.name=cifar10"], ["data.name = 'cifar10'", "'digits'"]),
        (["run_dir=/proc/run"], ["run_dir", "/proc/run"]),
    ],
)
def test_train_refuses(fails, digits, tmp_path, more, words):
    line = fails("train", *few_steps(digits, tmp_path / "run", *more))
    for word in words:
        assert word in line, line
    assert not (tmp_path / "run").exists()


def test_explain_lists_the_splits_that_divide(fails, digits, tmp_path):
    assert "world sizes that do: 1, 2, 4" in fails("explain", *few_steps(digits, tmp_path / "run"), "--world", 3)
    assert "--ranks-per-node 3" in fails(
        "explain", *few_steps(digits, tmp_path / "run"), "--world", 4, "--ranks-per-node", 3
    )
    assert "--world 0" in fails("explain", *few_steps(digits, tmp_path / "run"), "--world", 0)


def test_overrides_may_stand_behind_options(digits, tmp_path, capsys):
    config, *overrides = few_steps(digits, tmp_path / "run")
    assert cli.main(["explain", config, "--world", "2", *overrides]) == 0
    with pytest.raises(SystemExit) as exit:
        cli.main(["explain", config, "--wrld", "2", *overrides])
    assert exit.value.code == 2 and "--wrld" in capsys.readouterr().err


def test_explain_says_what_would_run(digits, tmp_path, capsys):
    assert cli.main(["explain", *few_steps(digits, tmp_path / "run"), "--world", "4"]) == 0
    output = capsys.readouterr().out
    for words in (
        "4 = 1 image shard(s) x 4 view shard(s)",
        "2 steps",
        "24,648 parameters",
        "96 positive and 96 negative",
        "MiB",
        "(new)",
    ):
        assert words in output, output
    assert not (tmp_path / "run").exists()


def damaged(digits, tmp_path, harm):
    root = tmp_path / "data"
    shutil.copytree(digits, root)
    path = root / "train.beton"
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "foreign":
        path.write_bytes(b"not a beton file" * 1000)
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        tree = json.loads((root / "dataset.json").read_text())
        tree["splits"]["train"]["count"] += 1
        (root / "dataset.json").write_text(json.dumps(tree))
    return root


@pytest.mark.parametrize("harm", ["missing", "truncated", "foreign", "empty", "other count"])
@pytest.mark.parametrize("command", ["train", "explain"])
def test_files_that_are_not_what_they_should_be(fails, digits, tmp_path, harm, command):
    root = damaged(digits, tmp_path, harm)
    line = fails(command, *few_steps(root, tmp_path / "run"))
    assert "train.beton" in line and "convert" in line, line
    assert not (tmp_path / "run").exists()


def test_no_ffcv_says_how_to_go_on(fails, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    for name in [name for name in sys.modules if name.startswith("ffcv.") or name == "ssl_dist.data.ffcv_reader"]:
        monkeypatch.delitem(sys.modules, name)
    line = fails("train", *few_steps(digits, tmp_path / "run", "data.reader=ffcv"))
    assert "libturbojpeg0-dev" in line and "data.reader=arrays" in line


def test_run_folders(fails, digits, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", *few_steps(digits, run)]) == 0
    capsys.readouterr()
    line = fails("train", *few_steps(digits, run, "optim.lr=0.5", "backbone.name=resnet8"))
    assert "optim.lr (there 0.001, now 0.5)" in line and "backbone.name" in line
    # another method's or backbone's checkpoint under this config
    other = tmp_path / "other"
    assert cli.main(["train", *few_steps(digits, other, "backbone.name=resnet8")]) == 0
    for file in (other / "checkpoints").iterdir():
        shutil.copy(file, run / "checkpoints" / file.name)
    capsys.readouterr()
    assert (
        "is of a run with" in (line := fails("train", *few_steps(digits, run, "optim.steps=3"))) and "resnet8" in line
    )


def test_evaluate_and_extract(digits, tmp_path, capsys, fails):
    run = tmp_path / "run"
    assert cli.main(["train", *few_steps(digits, run)]) == 0
    assert cli.main(["evaluate", str(run), "knn", "logistic", "knn.k=[5]"]) == 0
    captured = capsys.readouterr()
    assert "missing; extracting" in captured.err and "knn5" in captured.out and "logistic" in captured.out
    for line in (
        "run: step 2/2",
        "run: features digits train: ",
        "run: features digits test: ",
        "run: knn: ",
        "run: logistic: ",
    ):
        assert f"\n{line}" in captured.err, "of several runs at once each line names its own"
    assert {r["name"] for r in json.loads((run / "results.json").read_text())} >= {"knn5_top1", "logistic_top1"}
    assert cli.main(["evaluate", str(run), "knn", "knn.k=[5]"]) == 0
    captured = capsys.readouterr()
    assert "already" in captured.err and "knn5_top1" in captured.out
    assert cli.main(["evaluate", str(run), "knn", "knn.k=[3]"]) == 0
    assert "already" not in capsys.readouterr().err
    assert cli.main(["train", *few_steps(digits, run, "optim.steps=3")]) == 0
    assert cli.main(["evaluate", str(run), "knn", "knn.k=[5]"]) == 0
    assert capsys.readouterr().err.count("stale") == 2
    assert "did you mean 'knn'" in fails("evaluate", run, "knnn")
    assert "not a run's folder" in fails("evaluate", tmp_path / "absent", "knn")
    assert "at least one evaluator" in fails("evaluate", run, "knn.k=3")
    assert "checkpoint" in fails("extract", tmp_path / "absent.pt", "--out", tmp_path / "f")
    assert cli.main(["extract", str(run), "--split", "test", "--out", str(tmp_path / "f")]) == 0
    assert (tmp_path / "f" / "digits-test.safetensors").exists()


def test_help_is_quick_and_names_every_command():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ssl_dist", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("convert", "train", "extract", "evaluate", "explain", "keys", "doctor"):
        assert name in done.stdout
    for slow in ("torch", "numba", "pydantic"):
        assert f" {slow}\n" not in done.stderr, f"--help must not wait for {slow}"
