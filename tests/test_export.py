"""Exported backbones load strictly in torchvision, timm and the official code's networks, and compute the same."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from ssl_dist import backbones, cli, config
from ssl_dist.export.command import beside
from ssl_dist.export.libraries import OF_TIMM, OF_TORCHVISION, detectron2_name
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
    first, line, images = capsys.readouterr().out.strip().split("\n")
    assert str(out) in first and Path(images.removeprefix("images: ")).is_file()
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
    assert json.loads(metadata.pop("preprocessing")) == json.loads(beside(out).read_text())
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


@pytest.mark.parametrize("form", ["seed", "huggingface"])
def test_no_space_is_one_line_and_leaves_nothing(run_of, tmp_path, capsys, monkeypatch, form):
    """Whichever change to the disk is the first that fails: of a file in a folder that is there, and of a folder."""
    run, out = run_of("conv4"), tmp_path / "out" / "s.tar"
    if form == "seed":
        out.parent.mkdir()
    capsys.readouterr()
    for allowed in range(20):
        with monkeypatch.context() as patches:
            disk = FullDisk(patches, tmp_path / "out", allowed)
            code = cli.main(["export", str(run), "--format", form, "--out", str(out)])
        if code == 0:
            break
        assert disk.changes > allowed and code == 2 and [*tmp_path.glob("out/*")] == []
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "s.tar" in line and "No space left" in line
    assert allowed > 3 and out.exists() and not [*tmp_path.rglob("*.tmp")]


def test_what_is_there_stays_unless_told(run_of, tmp_path, capsys):
    run, file, folder = run_of("conv4"), tmp_path / "s.tar", tmp_path / "hub"

    def again(form, out, *more):
        code = cli.main(["export", str(run), "--format", form, str(out), *more])  # OUT may stand last, too
        return code, capsys.readouterr().err

    assert again("seed", file)[0] == again("huggingface", folder)[0] == 0
    before = file.stat().st_ino
    for out, form, name in ((file, "seed", "s.tar"), (folder, "huggingface", "model.safetensors")):
        code, error = again(form, out)
        assert code == 2 and f"{name}: is there already; give another OUT, or --overwrite" in error
        assert again(form, out, "--overwrite")[0] == 0
    assert file.stat().st_ino != before
    (folder / "README.md").unlink()
    (folder / "notes.txt").write_text("mine")
    assert again("huggingface", folder)[0] == 2 and not (folder / "README.md").exists()
    assert again("huggingface", folder, "--overwrite")[0] == 0 and (folder / "notes.txt").read_text() == "mine"
    assert "is a folder, and this format is a file" in again("seed", folder, "--overwrite")[1]
    assert "is a file, and this format is a folder" in again("huggingface", file, "--overwrite")[1]
    assert "is no regular file" in again("seed", "/dev/null", "--overwrite")[1]


def test_what_cannot_be_exported(run_of, random_run, tmp_path, capsys):
    """One line with a remedy, and nothing is written."""
    run = run_of("conv4")
    for words, message in {
        ("--format", "onxx", "x.onnx"): "--format onxx: no such format; did you mean 'onnx'?",
        ("--format", "onnx"): "give one file or folder to write: ssl-dist export",
        ("x", "--format", "onnx", "--out", "y"): "give one file or folder to write",
        ("--format", "pt2", "x.bin"): "a file of --format pt2 must end with .pt2 to be read; give x.bin.pt2",
        ("--format", "mmdet", "x.pth"): "mmdet has no network with the tensors of backbone conv4, but of resnet18, "
        "resnet34, resnet50, resnet101; use --format huggingface, onnx, pt2, seed",
    }.items():
        capsys.readouterr()
        assert cli.main(["export", str(run), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not [*Path().glob("x*")]
    assert cli.main(["export", str(random_run), str(tmp_path / "x"), "--format", "huggingface"]) == 2
    assert "holds random weights, of step 0 (random_weights); export a run that has trained" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_backbone_that_the_library_has_not_is_refused(run_of, tmp_path, capsys):
    for name in ("conv4", "resnet18_small_stem"):
        run = run_of(name)
        for form in ("torchvision", "timm"):
            capsys.readouterr()
            assert cli.main(["export", str(run), "--format", form, "--out", str(tmp_path / "file")]) == 2
            error = capsys.readouterr().err
            assert f"no network with the tensors of backbone {name}" in error and error.count("\n") == 1
            assert "use --format huggingface, onnx, pt2, seed" in error and not (tmp_path / "file").exists()
    assert cli.main(["export", str(run), "--format", "seed", "--out", "/proc/file"]) == 2
    assert "/proc/file: cannot be written" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "none"), "--format", "seed", "--out", str(tmp_path / "file")]) == 2
    assert "not found" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_detectron2s_names(name):
    """Those of its ResNet with a frozen BatchNorm, from its structure."""
    convolutions = ("conv1", "conv2", "conv3") if name == "resnet50" else ("conv1", "conv2")
    numbers = (3, 4, 6, 3) if name == "resnet50" else (2, 2, 2, 2)
    expected = {"stem.conv1"}
    for stage, count in enumerate(numbers, 2):
        for block in range(count):
            is_wider = block == 0 and not (stage == 2 and name == "resnet18")
            expected |= {f"res{stage}.{block}.{part}" for part in (*convolutions, *["shortcut"] * is_wider)}
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [part for conv in expected for part in (f"{conv}.weight", *(f"{conv}.norm.{norm}" for norm in norms))]
    with torch.device("meta"):
        assert sorted(map(detectron2_name, backbones.build(name).state_dict())) == sorted(names)


def test_files_for_detectors(run_of, tmp_path, capsys):
    """docs/weights.md says what detectron2's, mmdet's and mmpretrain's own code made of such files."""
    run, scope = run_of("resnet18"), {}
    state, mean = load_encoder(run).module.state_dict(), load_encoder(run).normalize.mean
    line = export(run, "detectron2", tmp_path / "d.pth", capsys)
    content = torch.load(tmp_path / "d.pth", weights_only=True)
    assert content.keys() == {"model", "__author__", "matching_heuristics"} and content["matching_heuristics"] is True
    for theirs, ours in {
        "stem.conv1.norm.bias": "bn1.bias",
        "res4.1.conv2.weight": "layer3.1.conv2.weight",
        "res5.0.shortcut.norm.running_var": "layer4.0.downsample.1.running_var",
    }.items():
        assert torch.equal(content["model"][theirs], state[ours])
    assert not [name for name in content["model"] if "num_batches" in name]  # unknown to its frozen BatchNorm
    options = eval(line.removeprefix("cfg.merge_from_list"))
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert (given["MODEL.WEIGHTS"], given["MODEL.RESNETS.DEPTH"]) == (str(tmp_path / "d.pth"), 18)
    assert given["MODEL.PIXEL_MEAN"] == pytest.approx([255 * value for value in mean], abs=1e-3)
    exec(export(run, "mmdet", tmp_path / "m.pth", capsys), scope)
    assert scope["model"]["backbone"]["init_cfg"] == {"type": "Pretrained", "checkpoint": str(tmp_path / "m.pth")}
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert content["meta"]["backbone"] == "resnet18" and content["state_dict"].keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in content["state_dict"].items())
