"""Each known data set as its files lie on disk, and folders that are not what was asked for."""

import urllib.error
import zipfile

import numpy as np
import pytest
from PIL import Image

from ssl_dist.data import manifest
from ssl_dist.data.beton import RAW, Beton
from tests.conversions import refusal, run, shown
from tests.make_images import cifar_files, picture, save, simple_folder, stl10_files, tiny_imagenet


def test_digits(digits):
    dataset = manifest.load(digits)
    assert {split: facts.count for split, facts in dataset.splits.items()} == {"train": 1442, "test": 355}
    assert dataset.classes == list("0123456789") and min(dataset.splits["test"].class_counts) >= 34
    from sklearn.datasets import load_digits

    data = load_digits()
    place = np.array([(data.target[:i] == data.target[i]).sum() for i in range(len(data.target))])
    for split, members in (("train", place % 5 != 4), ("test", place % 5 == 4)):
        file = Beton(digits / f"{split}.beton")
        assert file.labels.tolist() == data.target[members].tolist()
        assert set(file.heights) == set(file.widths) == {32} and (file.modes == RAW).all()
        pixels = np.stack([file.sample(i) for i in range(file.count)]).reshape(-1, 32, 32, 3)
        assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
        small = pixels[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)) * 16 / 255
        assert np.abs(small - data.images[members]).mean() < 0.8


@pytest.fixture
def no_checksums(monkeypatch):
    """torchvision takes our small files for the real ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)


@pytest.mark.parametrize(("dataset", "prefix"), [("cifar10", "class"), ("cifar100", "f"), ("supercifar100", "c")])
def test_cifar(tmp_path, no_checksums, dataset, prefix):
    splits = cifar_files(tmp_path / "source", hundred=dataset != "cifar10")
    # the folder above the files, or the files' own
    root = next((tmp_path / "source").iterdir()) if dataset == "cifar100" else tmp_path / "source"
    converted = run(dataset, root, tmp_path / "out")
    number = {"cifar10": 10, "cifar100": 100, "supercifar100": 20}[dataset]
    assert converted.classes == [f"{prefix}{i}" for i in range(number)] and converted.image_size == 32
    for split, (pixels, labels) in splits.items():
        file = Beton(tmp_path / "out" / f"{split}.beton")
        if dataset != "cifar10":
            labels = [pair[dataset == "supercifar100"] for pair in labels]
        assert file.labels.tolist() == labels
        assert (np.stack([file.sample(i) for i in range(file.count)]) == pixels.reshape(len(pixels), -1)).all()


def test_stl10(tmp_path, no_checksums):
    splits = stl10_files(tmp_path / "source")
    converted = run("stl10", tmp_path / "source", tmp_path / "out")
    assert list(converted.splits) == ["unlabeled", "train", "test"] and converted.pretraining == "unlabeled"
    for split, (pixels, labels) in splits.items():
        file = Beton(tmp_path / "out" / f"{split}.beton")
        assert (np.stack([file.sample(i) for i in range(file.count)]) == pixels.reshape(len(pixels), -1)).all()
        assert file.labels.tolist() == (labels.tolist() if split != "unlabeled" else [-1] * 5)


def test_without_a_download_the_remedy_is_named(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    message = refusal("cifar10", tmp_path / "source", tmp_path / "out")
    for word in ("cifar-10-python.tar.gz", "no network", "convert folder --name cifar10", str(tmp_path / "source")):
        assert word in message


def test_tiny_imagenet_in_every_form(tmp_path):
    folder = tiny_imagenet(tmp_path / "source" / "tiny-imagenet-200")
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder.parent))
    roots = [tmp_path / "tiny-imagenet-200.zip", tmp_path, folder, folder.parent]
    outs = [tmp_path / f"out{i}" for i in range(4)]
    for root, out in zip(roots, outs, strict=True):
        converted = run("tiny-imagenet", root, out)
    assert len({(out / name).read_bytes() for out in outs for name in ["train.beton"]}) == 1
    assert len({(out / name).read_bytes() for out in outs for name in ["val.beton"]}) == 1
    assert converted.classes == ["n01", "n02", "n03"] and list(converted.splits) == ["train", "val"]
    # val_10 comes after val_9, labels follow val_annotations.txt: n03, n01, n02, n03 ...
    file = Beton(outs[0] / "val.beton")
    assert file.labels.tolist() == [2, 0, 1] * 4
    expected = np.asarray(Image.open(folder / "val" / "images" / "val_10.JPEG").convert("RGB"))
    assert (shown(file, 10, tmp_path) == expected).all()
    assert Beton(outs[0] / "train.beton").labels.tolist() == [0, 0, 1, 1, 2, 2]

    arranged = simple_folder(tmp_path / "arranged", splits=("train", "val"))
    assert run("tiny-imagenet", arranged, tmp_path / "out-arranged").classes == ["blue", "red"]


def test_wrong_folders(tmp_path):
    out = tmp_path / "out"
    assert "no such folder" in refusal("folder", tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "looked for" in refusal("folder", tmp_path / "empty", out)
    simple_folder(tmp_path / "above" / "inside")
    assert f"use --root {tmp_path / 'above' / 'inside'}" in refusal("folder", tmp_path / "above", out)
    save(tmp_path / "flat" / "train" / "1.png", picture(5, 5))
    message = refusal("folder", tmp_path / "flat", out)
    assert "1 image lies in no class folder (1.png)" in message and "ROOT/unlabeled/" in message
    root = simple_folder(tmp_path / "stray")
    save(root / "train" / "1.png", picture(5, 5))
    assert f"{root / 'train'}: 1 image lies in no class folder (1.png)" in refusal("folder", root, out)
    root = simple_folder(tmp_path / "bare")
    (root / "test" / "green").mkdir()
    assert f"{root / 'test' / 'green'}: holds no image" in refusal("folder", root, out)
    save(root / "test" / "green" / "1.png", picture(5, 5))
    assert f"{root / 'test' / 'green'}: a class" in refusal("folder", root, out)
    root = simple_folder(tmp_path / "late", splits=("test",))
    assert "train/" in refusal("folder", root, out)
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        message = refusal("tiny-imagenet", path, out)
        assert "tiny-imagenet-200.zip" in message and "val_annotations.txt" in message
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"PK half a download")
    assert "download it again" in refusal("tiny-imagenet", tmp_path / "tiny-imagenet-200.zip", out)
    assert not out.exists()
