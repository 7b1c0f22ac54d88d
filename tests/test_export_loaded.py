"""From JPEG files to features: what each format's own library makes of an export is what `ssl-dist extract` wrote."""

import functools
import json
import re
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageOps
from torchvision import transforms

import ssl_dist
from ssl_dist import backbones, cli, config, results
from ssl_dist.errors import UserError
from ssl_dist.export import graphs
from ssl_dist.storage import hub
from ssl_dist.storage.features import read_features
from ssl_dist.train.loop import train
from tests import golden_fill
from tests.make_images import picture, save

SIZES = [(50, 70), (70, 50), (64, 64), (40, 91), (150, 60)]  # height, width


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of JPEG files of several sizes and one of them turned by its EXIF orientation, and the converted set."""
    root = tmp_path_factory.mktemp("photos")
    for split in ("train", "test"):
        for number, (height, width) in enumerate(SIZES):
            save(
                root / "files" / split / "ab"[number % 2] / f"{number}.jpg", picture(height, width, number), quality=92
            )
    exif = Image.Exif()
    exif[274] = 6
    save(root / "files" / "test" / "a" / "4.jpg", picture(40, 60, 9), exif=exif)  # small: stored as pixels, not anew
    words = [
        "convert",
        "folder",
        "--root",
        root / "files",
        "--out",
        root / "data",
        "--name",
        "photos",
        "--workers",
        "1",
    ]
    assert cli.main([*map(str, words)]) == 0
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A function that makes a run on the photos whose backbone has filled weights; returns its folder, the features
    that `extract` wrote of the test images, and those images."""

    @functools.cache
    def make(name, size):
        folder = tmp_path_factory.mktemp("runs")
        torch.manual_seed(5)
        network = backbones.build(name)
        if not name.startswith("timm/"):
            golden_fill.fill(network, 5)  # not the initial statistics of BatchNorm
        torch.save(network.state_dict(), folder / "filled.pth")
        overrides = [
            f"data.root={photos / 'data'}", "data.name=photos", "data.reader=arrays", f"run_dir={folder / 'run'}",
            f"backbone.name={name}", f"backbone.weights={folder / 'filled.pth'}", f"data.image_size={size}",
            f"data.eval_resize={round(size * 1.14)}", "data.eval_interpolation=bicubic",
            "optim.batch_size=4",
        ]  # fmt: skip
        assert train(config.load("configs/digits/random_weights-conv4.yaml", overrides)) == 0
        assert cli.main(["extract", str(folder / "run"), "--split", "test", "--out", str(folder)]) == 0
        [listed] = set(folder.glob("photos-test*")) - {folder / "photos-test.safetensors"}
        files = [photos / "files" / line for line in listed.read_text().splitlines()]
        return folder / "run", read_features(folder / "photos-test.safetensors").features, files

    return make


def export(run, form, out):
    assert cli.main(["export", str(run), str(out), "--format", form]) == 0
    return out


def upright(files):
    return [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]


def assert_equal(features, expected):
    """To 1e-5 of the largest."""
    np.testing.assert_allclose(np.asarray(features), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def prepared(file, images):
    """The images as the file beside an export says: float32 [N, 3, S, S]."""
    steps = json.loads(file.read_text())
    made = torch.stack([eval(steps["torchvision"], {"transforms": transforms})(image) for image in images])
    assert steps["input"] == f"float32 {['N', *made.shape[1:]]}, RGB".replace("'", "")
    return made


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("conv4", 32),
        pytest.param("resnet32", 32, marks=pytest.mark.slow),
        pytest.param("resnet18", 64, marks=pytest.mark.slow),
        pytest.param("timm/test_vit", 160, marks=pytest.mark.slow),
    ],
)
def test_graphs_run_without_the_code(trained, tmp_path, name, size):
    """onnxruntime and torch.export, on batches of 1, 2 and all the rest."""
    onnxruntime = pytest.importorskip("onnxruntime")
    run, expected, files = trained(name, size)
    onnx, pt2 = export(run, "onnx", tmp_path / "m.onnx"), export(run, "pt2", tmp_path / "m.pt2")
    x = prepared(tmp_path / "m.onnx.preprocessing.json", upright(files))
    session, extra = onnxruntime.InferenceSession(onnx), {"preprocessing.json": ""}
    program = torch.export.load(pt2, extra_files=extra).module()
    for batches in ([1, 2, len(x) - 3], [len(x)]):
        parts = x.split(batches)
        assert_equal(
            np.concatenate([session.run(["features"], {"images": part.numpy()})[0] for part in parts]), expected
        )
        assert_equal(torch.cat([program(part) for part in parts]).detach(), expected)
    assert session.get_inputs()[0].shape == ["batch", 3, size, size]
    metadata = session.get_modelmeta().custom_metadata_map
    steps = json.loads((tmp_path / "m.pt2.preprocessing.json").read_text())
    assert json.loads(metadata["preprocessing"]) == json.loads(extra["preprocessing.json"]) == steps
    assert metadata["backbone"] == name and steps["crop"] == size and steps["interpolation"] == "bicubic"
    for path in (onnx, pt2):
        assert b"/ssl_dist/" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 48),
        ("timm/test_vit", 160),
        pytest.param("timm/crossvit_9_240", 64, marks=pytest.mark.slow),  # takes other sizes than its own 240 px
    ],
)
def test_timm_reads_the_folder(trained, tmp_path, name, size):
    """By its name with local-dir:, with timm's own transform of it; with another classifier, and by what we read."""
    timm = pytest.importorskip("timm")
    run, expected, files = trained(name, size)
    folder, images = export(run, "timm-folder", tmp_path / "a" / "folder"), upright(files)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        assert_equal(model(torch.stack([transform(image) for image in images])), expected)
        assert_equal(model(prepared(folder / "preprocessing.json", images)), expected)
        fine = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
        assert fine(torch.zeros(2, 3, size, size)).shape == (2, 7)
    kept = fine.state_dict()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())
    np.testing.assert_array_equal(ssl_dist.load(folder, device="cpu").embed(images, progress=False), expected)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "preprocessing.json"]


def test_the_share_of_the_crop_gives_timm_the_same_resize():
    from ssl_dist.export.preprocessing import _crop_share

    for crop in (32, 64, 96, 160, 224, 299):
        for resize in range(crop, 2 * crop):
            assert int(crop / _crop_share(crop, resize)) == resize


@pytest.mark.parametrize(("name", "size"), [("conv4", 32), pytest.param("resnet18", 48, marks=pytest.mark.slow)])
def test_a_folder_for_the_hub(trained, photos, tmp_path, monkeypatch, name, size):
    """Its card is what the run knows; its code gives the features; the commands and `ssl_dist.load` read it."""
    run, expected, files = trained(name, size)
    assert cli.main(["evaluate", str(run), "knn", "knn.k=[1]"]) == 0
    records = results.read(run / "results.json")
    results.add(run / "results.json", [records[0] | {"checkpoint": "0" * 64, "value": 12.34}])
    folder = export(run, "huggingface", tmp_path / "hub")
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "timm" if name == "resnet18" else "ssl_dist",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction"],  # of a file that could be anybody's
    }
    for fact in (
        f"# {name}, random_weights on photos", f"makes {expected.shape[1]} features", "photos: 5 images", "seed | 0 ",
        "Its weights are those of filled.pth (SHA-256 ", f"torch {torch.__version__}",
        f"SHA-256 {records[0]['checkpoint']}",
        f"| {records[0]['name']} | {records[0]['value']:.2f} | photos, test | [1] |", f"1. {records[0]['protocol']}",
    ):  # fmt: skip
        assert fact in card.text, fact
    assert "12.34" not in card.text and "license" not in card.content and str(tmp_path) not in card.content
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == (4 if name == "resnet18" else 3)
    images = upright(files)
    for block in blocks[1:]:
        scope = {"images": images, "image": images[0]}
        if "torch.load_file" in block:
            exec(blocks[0], made := {})
            scope["images"] = torch.stack([made["transform"](image) for image in images])
        exec(block.replace("FOLDER", str(folder)), scope)
        features = torch.as_tensor(scope["features"]).detach()
        assert_equal(features, expected[: len(features)])
    words = ["extract", folder, "--out", tmp_path / "again", "--split", "test", f"data.root={photos / 'data'}"]
    assert cli.main([*map(str, words), "data.reader=arrays"]) == 0
    np.testing.assert_array_equal(read_features(tmp_path / "again" / "photos-test.safetensors").features, expected)
    words = ["evaluate", folder, "knn", "knn.k=[1]", "--out", tmp_path / "again", f"data.root={photos / 'data'}"]
    assert cli.main([*map(str, words), "data.reader=arrays"]) == 0
    assert results.read(tmp_path / "again" / "results.json")[0]["value"] == records[0]["value"]
    monkeypatch.setattr(hub, "located", lambda text: {"hf:/me/mine": folder / "model.safetensors"}[text])
    loaded = ssl_dist.load("hf://me/mine", device="cpu")  # uploaded, it needs no backbone=
    np.testing.assert_array_equal(loaded.embed(images, progress=False), expected)


@pytest.mark.slow
def test_images_of_other_channels(tmp_path, capsys):
    """timm, ONNX, torch.export and what we read take them; the others have no such network, and say so."""
    timm, onnxruntime = pytest.importorskip("timm"), pytest.importorskip("onnxruntime")
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 40, 40, 5), np.uint16)
    for split, rows in (("train", pixels), ("test", pixels)):
        for number, row in enumerate(rows):
            file = tmp_path / "files" / split / "ab"[number % 2] / f"{number}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, row)
    words = ["convert", "folder", "--root", tmp_path / "files", "--out", tmp_path / "data", "--channels", "5"]
    assert cli.main([*map(str, words), "--name", "planes"]) == 0
    torch.save(backbones.build("resnet18", in_channels=5).state_dict(), tmp_path / "filled.pth")
    run = tmp_path / "run"
    overrides = [
        f"data.root={tmp_path / 'data'}", "data.name=planes", "data.reader=arrays", f"run_dir={run}",
        "backbone.name=resnet18", f"backbone.weights={tmp_path / 'filled.pth'}", "data.image_size=32",
        "data.eval_resize=40", "optim.batch_size=4", "views.groups=[{random_resized_crop: {}}]",
    ]  # fmt: skip
    assert train(config.load("configs/digits/random_weights-conv4.yaml", overrides)) == 0
    assert cli.main(["extract", str(run), "--split", "test", "--out", str(tmp_path)]) == 0
    expected = read_features(tmp_path / "planes-test.safetensors").features
    hub, folder = export(run, "huggingface", tmp_path / "hub"), export(run, "timm-folder", tmp_path / "timm")
    model = ssl_dist.load(hub, device="cpu")
    images = list(pixels[[0, 2, 1, 3]])  # by their classes
    np.testing.assert_array_equal(model.embed(images, progress=False), expected)
    x = model.transform(images)
    session = onnxruntime.InferenceSession(export(run, "onnx", tmp_path / "m.onnx"))
    assert_equal(session.run(None, {"images": x.numpy()})[0], expected)
    assert_equal(torch.export.load(export(run, "pt2", tmp_path / "m.pt2")).module()(x).detach(), expected)
    with torch.no_grad():
        for path in (hub, folder):
            theirs = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
            assert_equal(theirs(x), expected)
    card = (hub / "README.md").read_text()
    assert "5 channels, upright" in card and "torchvision" not in card and "in_chans=5" in card
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block.replace("FOLDER", str(hub)), scope := {"images": images if "ssl_dist.load" in block else x})
        assert_equal(torch.as_tensor(scope["features"]).detach(), expected)
    for form in ("torchvision", "detectron2", "mmdet"):
        capsys.readouterr()
        assert cli.main(["export", str(run), str(tmp_path / "x.pth"), "--format", form]) == 2
        assert capsys.readouterr().err == (
            f"error: --format {form}: {form} has no resnet18 for images of 5 channels; use --format timm, "
            "timm-folder, huggingface, onnx, pt2, seed\n"
        )


def test_a_folder_whose_metadata_is_damaged(trained, tmp_path):
    run, _, _ = trained("conv4", 32)
    folder = export(run, "huggingface", tmp_path / "hub")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for old, new, message in (
        (b'\\"crop\\": 32', b'\\"crop\\": -2', r"preprocessing\.crop"),
        (b'\\"crop\\": 32', b'\\"crop\\"; 32', r"damaged metadata \(preprocessing\); export it again"),
    ):
        assert old in content
        file.write_bytes(content.replace(old, new))
        with pytest.raises(UserError, match=message):
            ssl_dist.load(folder)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, file)  # of others
    for path in (folder, file):
        with pytest.raises(UserError, match=r"holds no checkpoint|a safetensors file, .* backbone\.name="):
            ssl_dist.load(path)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="not found"):
        ssl_dist.load(folder)


def test_what_onnx_needs(trained, tmp_path, capsys, monkeypatch):
    run, _, _ = trained("conv4", 32)
    monkeypatch.setattr(graphs, "MAX_BYTES", 1000)
    assert cli.main(["export", str(run), str(tmp_path / "m.onnx"), "--format", "onnx"]) == 2
    assert "take more than the 2 GiB of one ONNX file; use --format pt2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export", str(run), str(tmp_path / "m.onnx"), "--format", "onnx"]) == 2
    assert "onnxscript is not installed; pip install onnx onnxscript" in capsys.readouterr().err


def test_a_network_of_which_torch_makes_no_graph(trained, tmp_path, capsys, monkeypatch):
    """One line with torch's reason."""
    run, _, _ = trained("conv4", 32)
    monkeypatch.setattr(backbones.conv4.Conv4, "pooled", lambda self, x: x.mean((2, 3)) * float(x.sum().item()))
    for form, file in (("onnx", "m.onnx"), ("pt2", "m.pt2")):
        capsys.readouterr()
        assert cli.main(["export", str(run), str(tmp_path / file), "--format", form]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --format {form}: torch cannot make a graph of backbone conv4: ")
        assert error.count("\n") == 1 and not (tmp_path / file).exists()
    monkeypatch.undo()

    def without_operator(*_, **__):
        raise RuntimeError("Failed to convert\nNext steps: ...") from NotImplementedError("only 4D queries")

    monkeypatch.setattr(torch.onnx, "export", without_operator)
    assert cli.main(["export", str(run), str(tmp_path / "m.onnx"), "--format", "onnx"]) == 2
    assert "of backbone conv4: only 4D queries; use --format pt2, which torch can make\n" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "m.pt2"), "--format", "pt2"]) == 0
