"""`ssl_dist.load`: a trained network takes images as people have them, and sees what the commands see."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models, transforms

import ssl_dist
from ssl_dist import cli
from ssl_dist.config import Normalize
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from ssl_dist.run.embedder import IMAGENET, files_of
from ssl_dist.storage.features import read_features
from tests.make_images import picture, save


@pytest.fixture(scope="module")
def pixels(digits):
    """Of the test split: uint8 [N, H, W, 3]."""
    with Dataset(digits, reader="arrays").open("test") as reader:
        [(pixels, _, _, _)] = list(reader.batches([np.arange(reader.info.count)]))
    return pixels.copy()


def test_it_gives_what_extract_writes(random_run, pixels, tmp_path, capsys):
    """To the bit, by a folder as by a checkpoint."""
    assert cli.main(["extract", str(random_run), "--split", "test", "--out", str(tmp_path)]) == 0
    expected = read_features(tmp_path / "digits-test.safetensors").features
    model = ssl_dist.load(str(random_run), device="cpu")
    capsys.readouterr()
    np.testing.assert_array_equal(model.embed(pixels, progress=False), expected)
    assert capsys.readouterr().err == ""
    [checkpoint] = (random_run / "checkpoints").glob("step-*.pt")
    np.testing.assert_array_equal(ssl_dist.load(checkpoint, device="cpu").embed(pixels), expected)
    assert "embedding: 355/355" in capsys.readouterr().err
    assert (model.dim, model.size, model.device.type, model.training) == (expected.shape[1], 32, "cpu", False)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and "layer output" in repr(model)


def test_every_form_of_an_image(random_run, pixels):
    model, few = ssl_dist.load(random_run, device="cpu"), pixels[:3]
    expected = model(few)
    tensors = torch.from_numpy(few).permute(0, 3, 1, 2)
    images = [Image.fromarray(array) for array in few]
    for form in (images, list(few), tensors, list(tensors), [images[0], few[1], tensors[2]], model.transform(few)):
        assert torch.equal(model(form), expected)
    torch.testing.assert_close(model(images[0]), expected[:1])
    loader = DataLoader(TensorDataset(tensors, torch.arange(3)), batch_size=2)
    torch.testing.assert_close(torch.from_numpy(model.embed(loader, progress=False)), expected)
    np.testing.assert_array_equal(model.embed(Image.fromarray(pixels[0]), progress=False), model(pixels[0]))
    torch.testing.assert_close(copy.deepcopy(model).bfloat16()(images[0]), expected[:1], rtol=0.1, atol=0.1)
    assert model.embed([], progress=False).shape == (0, model.dim) == tuple(model([]).shape)


def test_pixels_that_are_not_normalised_are_noticed(random_run, pixels):
    model = ssl_dist.load(random_run, device="cpu")
    raw = torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2) / 255
    with pytest.warns(UserWarning, match="from 0 to 1 count as normalised"):
        model.embed(DataLoader(raw, 2), progress=False)
    with warnings.catch_warnings(action="error"):
        for images in (model.transform(pixels[:4]), torch.zeros(2, 3, 32, 32), pixels[:4]):
            model.embed(images, progress=False)


def test_a_folder_of_photos(random_run, tmp_path):
    """Of any sizes, in the order of their names, upright."""
    save(tmp_path / "b.png", picture(40, 60))
    save(tmp_path / "a" / "wide.jpg", picture(30, 90))
    lying = Image.fromarray(np.rot90(picture(40, 60)))
    exif = Image.Exif()
    exif[274] = 6  # a quarter to the right makes it upright
    lying.save(tmp_path / "c.png", exif=exif)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in files_of(tmp_path)] == ["wide.jpg", "b.png", "c.png"]
    model = ssl_dist.load(random_run, device="cpu")
    rows = model.embed(tmp_path, batch_size=2, progress=False)
    np.testing.assert_allclose(rows[1], rows[2], atol=1e-6)  # of batches of two and of one, which may round otherwise
    torch.testing.assert_close(torch.from_numpy(rows[1:2]), model(picture(40, 60)))
    (tmp_path / "d.jpg").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"d\.jpg: can not be read as an image"):
        model.embed(tmp_path, progress=False)
    with pytest.raises(UserError, match="none: not a folder"):
        model.embed(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        model.embed(tmp_path / "empty")


def test_a_stage(random_run, pixels):
    model, whole = ssl_dist.load(random_run, layer="layer2", device="cpu"), ssl_dist.load(random_run, device="cpu")
    with torch.no_grad():
        maps = whole.network.forward_stages(whole.transform(pixels[:4]))[1]["layer2"]
    torch.testing.assert_close(model(pixels[:4]), maps.mean((2, 3)))
    assert model.dim == maps.shape[1]
    with pytest.raises(UserError, match="did you mean 'layer2'"):
        ssl_dist.load(random_run, layer="layr2")
    with pytest.raises(UserError, match="layer = None"):
        ssl_dist.load(random_run, layer=None)


def test_weights_of_others_and_their_usual_transform(tmp_path):
    torch.manual_seed(0)
    theirs = models.resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    image = Image.fromarray(picture(300, 280))
    usual = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET.mean, IMAGENET.std),
        ]
    )
    theirs.fc = torch.nn.Identity()
    model = ssl_dist.load(tmp_path / "resnet18.pth", backbone="resnet18", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs(usual(image)[None]), rtol=1e-4, atol=1e-5)
    small = ssl_dist.load(tmp_path / "resnet18.pth", backbone="resnet18", image_size=64, device="cpu")
    assert (small.size, small.resize) == (64, 73)
    flat = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert ssl_dist.load(tmp_path / "resnet18.pth", backbone="resnet18", normalize=flat, device="cpu").mean == flat.mean
    pair = flat.mean, [0.25, 0.25, 0.25]
    assert ssl_dist.load(tmp_path / "resnet18.pth", backbone="resnet18", normalize=pair).std == (0.25, 0.25, 0.25)
    with pytest.raises(UserError, match="give backbone="):
        ssl_dist.load("timm:resnet18.a1_in1k")
    with pytest.raises(UserError, match="device = 'gpu'"):
        ssl_dist.load(tmp_path / "resnet18.pth", backbone="resnet18", device="gpu")
    with pytest.raises(UserError, match=r"backbone\.name"):
        ssl_dist.load(tmp_path / "resnet18.pth", backbone="resnet50")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4, 4, 1), np.uint8), r"\[4, 4, 1\] of uint8: give PIL images, or uint8 or uint16 \[H, W, 3\]"),
        (np.zeros((4, 4, 3)), r"\[4, 4, 3\] of float64"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\[4, 4, 3\] of torch.uint8: .* \[3, H, W\]"),
        (torch.zeros(3, 32, 32), r"\[3, 32, 32\] in floating point: give normalised ones"),
        (["a.jpg"], "an image is str"),
        (Image.new("F", (4, 4)), "mode 'F' do not fit 8 bits"),
    ],
)
def test_what_is_no_image(random_run, images, message):
    with pytest.raises(ValueError, match=message):
        ssl_dist.load(random_run, device="cpu")(images)


@pytest.mark.parametrize("images", [None, 3, TensorDataset(torch.zeros(2, 3, 32, 32))])
def test_what_gives_no_images(random_run, images):
    with pytest.raises(ValueError, match="give a folder, pictures, or a DataLoader"):
        ssl_dist.load(random_run, device="cpu").embed(images)
    with pytest.raises(ValueError, match=r"batch_size = 1\.5: give a whole number"):
        ssl_dist.load(random_run, device="cpu").embed([], batch_size=1.5)
