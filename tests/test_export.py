"""Exported backbones load strictly in torchvision, timm and the official code's networks, and compute the same."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from ssl_dist import backbones, cli, config
from ssl_dist.methods.relational import RelationModule
from ssl_dist.run.encoder import load_encoder
from ssl_dist.storage import checkpoint, weights
from ssl_dist.storage.features import read_features
from ssl_dist.train.loop import train
from tests import golden_fill
from tests.full_disk import FullDisk


@pytest.fixture
def run_of(digits, tmp_path):
    """Makes a run whose backbone has other weights than any initial ones; returns its folder."""

    def make(backbone, method="random_weights", *more):
        torch.manual_seed(5)
        network = backbones.build(backbone)
        if not backbone.startswith("timm/"):
            golden_fill.fill(network, 5)  # not the initial statistics of BatchNorm
        torch.save(network.state_dict(), tmp_path / "filled.pth")
        run = tmp_path / f"{method}-{backbone.replace('/', '-')}"
        overrides = [
            f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", f"backbone.name={backbone}",
            f"backbone.weights={tmp_path / 'filled.pth'}", *more,
        ]  # fmt: skip
        assert train(config.load(f"configs/digits/{method}-conv4.yaml", overrides)) == 0
        return run

    return make


def export(run, form, out, capsys):
    """Exports by the command; returns the Python that it says loads the file."""
    capsys.readouterr()
    assert cli.main(["export", str(run), "--format", form, "--out", str(out)]) == 0
    first, line = capsys.readouterr().out.strip().split("\n")
    assert str(out) in first
    return line


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_extract_normalises_as_the_file_says(run_of, digits, tmp_path, capsys):
    """The run's own values, not those of the data set, unless others are given."""
    out = tmp_path / "model.safetensors"
    run = run_of(
        "resnet18", "random_weights", views_normalize := "views.normalize={mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}"
    )
    export(run, "torchvision", out, capsys)
    given = [f"data.root={digits}", "data.name=digits", "data.reader=arrays", "backbone.name=resnet18"]
    for number, more in enumerate(([], [views_normalize.replace("0.1", "0.15")])):
        folder = str(tmp_path / f"features-{number}")
        assert cli.main(["extract", str(out), "--out", folder, "--split", "test", *given, *more]) == 0
        [file] = Path(folder).iterdir()
        mean = "0.15" if more else "0.1"
        assert f"mean ({mean}, 0.2, 0.3), std (0.4, 0.5, 0.6)" in read_features(file).metadata["transform"]
        assert ("as its metadata says" in capsys.readouterr().err) is not bool(more)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0"])
def test_torchvision_loads_it_and_computes_the_same(run_of, tmp_path, capsys, name):
    run, out = run_of(name), tmp_path / "out" / "model.safetensors"
    line = export(run, "torchvision", out, capsys)
    scope = {"torch": torch, "torchvision": torchvision, "safetensors": safetensors}
    exec(line, scope)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(IMAGES), load_encoder(run).module(IMAGES))
    # and back: the file is one that we read
    backbone = backbones.build(name)
    fitted = weights.fit(backbone, name, out)
    assert fitted.unused == []
    _, state, digest = checkpoint.load_newest(run)
    assert all(torch.equal(tensor, state["method"][f"backbone.{key}"]) for key, tensor in fitted.tensors.items())
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("normalize")) == state["normalize"]
    assert metadata == {"format": "pt", "backbone": name, "method": "random_weights", "checkpoint": digest, "step": "0"}


@pytest.mark.parametrize("name", ["resnet18", "timm/convnext_atto"])
def test_timm_loads_it_and_computes_the_same(run_of, tmp_path, capsys, name):
    timm = pytest.importorskip("timm")
    run, out = run_of(name), tmp_path / "model.safetensors"
    line = export(run, "timm", out, capsys)
    scope = {"timm": timm, "safetensors": safetensors}
    exec(line, scope)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(IMAGES), load_encoder(run).module(IMAGES))
    assert weights.fit(backbones.build(name), name, out).unused == []


def test_the_lists_of_each_librarys_networks_are_right():
    """Whatever is promised has the library's tensors, strictly; the rest is tested above for a few."""
    from ssl_dist.run.export import OF_TIMM, OF_TORCHVISION

    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        for name in OF_TORCHVISION:
            theirs = getattr(torchvision.models, name)()
            theirs.fc = theirs.classifier = torch.nn.Identity()
            theirs.load_state_dict(backbones.build(name).state_dict(), assign=True)
        for name in OF_TIMM:
            timm.create_model(name, num_classes=0).load_state_dict(backbones.build(name).state_dict(), assign=True)


def test_the_seeds_form_has_the_backbone_and_the_relation_head(run_of, tmp_path, capsys):
    run, out = (
        run_of("conv4", "relational", "data.limit=32", "optim.epochs=1", "optim.batch_size=16"),
        tmp_path / "s.tar",
    )
    line = export(run, "seed", out, capsys)
    content = torch.load(out, weights_only=True)
    assert content.keys() == {"backbone", "relation", "optimizer"}
    scope = {"torch": torch, "backbone": backbones.build("conv4").eval()}
    exec(line, scope)
    with torch.no_grad():
        torch.testing.assert_close(scope["backbone"](IMAGES), load_encoder(run).module(IMAGES))
    _, state, _ = checkpoint.load_newest(run)
    head = {key: state["method"][f"relation_module.{key}"] for key in content["relation"]}
    names = ("linear1.weight", "bn1.running_var", "linear2.bias")
    assert all(name in head for name in names) and all(torch.equal(t, head[k]) for k, t in content["relation"].items())
    assert weights.fit(scope["backbone"], "conv4", out).format == (
        "read under backbone. (as relational reasoning, SFRIK, VICReg, Barlow Twins, lightly and solo-learn save it), "
        "the backbone's own names"
    )


def test_the_seeds_form_goes_on_in_the_official_classes_and_back(run_of, digits, tmp_path, capsys):
    """The optimizer of the official code, with its two groups, takes the moments; and a run that is made of the archive
    ends where the first one would have."""
    few = ["data.limit=32", "optim.batch_size=16", "backbone.weights=null", "checkpoint.every_epochs=1"]
    run = run_of("conv4", "relational", *few, "optim.epochs=2")
    half, out, again = tmp_path / "half", tmp_path / "relationnet_epoch_1.tar", tmp_path / "again"
    words = [f"data.root={digits}", "data.reader=arrays", *few, "optim.epochs=2"]
    path = run / "checkpoints" / "step-00000002.pt"
    export(path, "seed", out, capsys)
    content, state = torch.load(out, weights_only=True), checkpoint.load(path)
    backbone, head = backbones.build("conv4"), RelationModule(64, 256, "cat")
    adam = torch.optim.Adam([{"params": backbone.parameters(), "lr": 1e-3}, {"params": head.parameters(), "lr": 1e-3}])
    head.load_state_dict(content["relation"])
    adam.load_state_dict(content["optimizer"])
    numbers = {p: n for n, p in enumerate([*backbone.parameters(), *head.parameters()])}
    for parameter, kept in adam.state.items():
        assert torch.equal(kept["exp_avg_sq"], state["optimizer"]["state"][numbers[parameter]]["exp_avg_sq"])
    config_file = "configs/digits/relational-conv4.yaml"
    assert cli.main(["import", str(out), config_file, *words, f"run_dir={again}"]) == 0
    assert capsys.readouterr().out == f"{again}/checkpoints/step-00000002.pt\n"
    assert cli.main(["train", config_file, *words, f"run_dir={again}"]) == 0
    one, other = (checkpoint.load_newest(folder)[1] for folder in (run, again))
    assert one["step"] == other["step"] == 4
    assert all(torch.equal(value, other["method"][name]) for name, value in one["method"].items())
    for message, changes in {
        "holds a run; choose another folder": [f"run_dir={again}"],
        "--epoch 3: the training has 2 epochs": [f"run_dir={half}", "--epoch", "3"],
        "lacks classifier": [f"run_dir={half}", "method={name: rotation}", "views.num=null"],
    }.items():
        capsys.readouterr()
        assert cli.main(["import", str(out), config_file, *words, *changes]) == 2
        assert message in capsys.readouterr().err and not half.exists()


def test_no_space_is_one_line(run_of, tmp_path, capsys, monkeypatch):
    run, out = run_of("conv4"), tmp_path / "out" / "s.tar"
    (tmp_path / "out").mkdir()
    capsys.readouterr()
    for allowed in range(3):
        with monkeypatch.context() as patches:
            disk = FullDisk(patches, tmp_path / "out", allowed)
            code = cli.main(["export", str(run), "--format", "seed", "--out", str(out)])
        assert (code, os.listdir(out.parent)) == ((2, []) if disk.changes > allowed else (0, ["s.tar"]))
        if code:
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ") and "s.tar" in line and "No space left" in line
    assert code == 0


def test_a_backbone_that_the_library_has_not_is_refused(run_of, tmp_path, capsys):
    for name in ("conv4", "resnet18_small_stem"):
        run = run_of(name)
        for form in ("torchvision", "timm"):
            capsys.readouterr()
            assert cli.main(["export", str(run), "--format", form, "--out", str(tmp_path / "file")]) == 2
            error = capsys.readouterr().err
            assert f"no network with the tensors of backbone {name}" in error and error.count("\n") == 1
            assert "--format seed" in error and not (tmp_path / "file").exists()
    assert cli.main(["export", str(run), "--format", "seed", "--out", "/proc/file"]) == 2
    assert "/proc/file: cannot be written" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "none"), "--format", "seed", "--out", str(tmp_path / "file")]) == 2
    assert "not found" in capsys.readouterr().err
