"""Data sets of transfer tables and SVHN, in small folders laid out as torchvision reads them: what is stored is what
torchvision's own classes give."""

import itertools
import json

import numpy as np
import pytest
import torchvision
from scipy.io import savemat

from ssl_dist.convert import transfer_sets
from ssl_dist.data.beton import Beton
from ssl_dist.data.catalog import CATALOG
from tests.conversions import refusal, run, shown
from tests.make_images import picture, save

NUMBERS = iter(range(10**6))


def image(path):
    number = next(NUMBERS)
    return save(path, picture(20 + number % 7, 24, number), **({"quality": 90} if path.suffix == ".jpg" else {}))


def food101(root):
    for split in ("train", "test"):
        listed = {dish: [f"{dish}/{split}{i}" for i in range(2)] for dish in ("waffles", "apple_pie")}
        for name in itertools.chain(*listed.values()):
            image(root / "food-101" / "images" / f"{name}.jpg")
        (root / "food-101" / "meta").mkdir(exist_ok=True)
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))


def flowers102(root):
    for number in range(1, 10):
        image(root / "flowers-102" / "jpg" / f"image_{number:05d}.jpg")
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": [[5, 5, 1, 102, 7, 1, 2, 3, 4]]})
    savemat(root / "flowers-102" / "setid.mat", {"trnid": [[9, 2, 3]], "valid": [[4, 5]], "tstid": [[1, 6, 7, 8]]})


def pets(root):
    for split in ("trainval", "test"):
        lines = []
        for label, breed in enumerate(("Abyssinian", "american_bulldog"), 1):
            for i in range(2):
                name = f"{breed}_{split}{i}"
                image(root / "oxford-iiit-pet" / "images" / f"{name}.jpg")
                lines.append(f"{name} {label} {label} 1\n")
        (root / "oxford-iiit-pet" / "annotations").mkdir(exist_ok=True)
        (root / "oxford-iiit-pet" / "annotations" / f"{split}.txt").write_text("".join(lines))


def aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    for split in ("train", "val", "test"):
        names = [f"{next(NUMBERS):07d}" for _ in range(4)]
        for name in names:
            image(data / "images" / f"{name}.jpg")
        lines = [f"{name} {variant}\n" for name, variant in zip(names, ["F/A-18", "Boeing 737-200"] * 2, strict=True)]
        (data / f"images_variant_{split}.txt").write_text("".join(lines))
    (data / "variants.txt").write_text("Boeing 737-200\nF/A-18\n")


def cars(root):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    lists = {"train": base / "devkit" / "cars_train_annos.mat", "test": base / "cars_test_annos_withlabels.mat"}
    for split, path in lists.items():
        rows = [(f"{i:05d}.jpg", 1 + i % 2) for i in range(1, 5)]
        for name, _ in rows:
            image(base / f"cars_{split}" / name)
        savemat(path, {"annotations": np.array(rows, dtype=[("fname", object), ("class", np.uint8)])})
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Audi S4"], object)})


def dtd(root):
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        names = [f"{texture}/{texture}_{split}{i}.jpg" for texture in ("banded", "woven") for i in range(2)]
        for name in names:
            image(base / "images" / name)
        (base / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))


def eurosat(root):
    for name in ("Forest", "River"):
        for i in range(1, 12):
            image(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg")


def svhn(root, splits=("train", "test", "extra")):
    root.mkdir()
    for split in splits:
        pixels = np.random.default_rng(next(NUMBERS)).integers(0, 256, (32, 32, 3, 5), np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [3], [9], [10]], np.uint8)})


MAKERS = {"food101": food101, "flowers102": flowers102, "pets": pets, "aircraft": aircraft, "cars": cars, "dtd": dtd}


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch):
    """torchvision takes our small files for the real ones."""
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    for module in ("svhn", "utils"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def same_as_torchvisions(file, images_and_labels, tmp_path):
    assert file.count == len(images_and_labels)
    for number, (expected, label) in enumerate(images_and_labels):
        assert (shown(file, number, tmp_path) == np.asarray(expected)).all() and file.labels[number] == label


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_stored_is_what_torchvision_gives(name, tmp_path):
    layout, root = transfer_sets.LAYOUTS[name], tmp_path / "source"
    MAKERS[name](root)
    converted = run(name, root, tmp_path / "out")
    again = run(name, root / layout.folder.split("/")[0], tmp_path / "again")  # the folder itself
    assert again == converted
    cls = getattr(torchvision.datasets, layout.cls)
    for split, parts in layout.splits.items():
        opened = [cls(root, split=part) for part in parts]
        expected = [data[i] for data in opened for i in range(len(data))]
        same_as_torchvisions(Beton(tmp_path / "out" / f"{split}.beton"), expected, tmp_path)
        assert converted.classes == list(getattr(opened[0], "classes", converted.classes))
    assert list(converted.splits) == list(layout.splits)
    entry = CATALOG[name]
    uses = (converted.pretraining, converted.training, converted.evaluation)
    assert uses == (entry.pretraining, entry.training, entry.evaluation) and converted.image_size == 224


def test_every_fifth_of_eurosat_is_a_test_image(tmp_path):
    eurosat(tmp_path / "source")
    converted = run("eurosat", tmp_path / "source", tmp_path / "out")
    data = torchvision.datasets.EuroSAT(tmp_path / "source")
    all_rows = np.arange(len(data))
    test = np.array([4, 9, 15, 20])  # of 11 images each, by name
    for split, rows in (("train", np.setdiff1d(all_rows, test)), ("test", test)):
        same_as_torchvisions(Beton(tmp_path / "out" / f"{split}.beton"), [data[i] for i in rows], tmp_path)
    assert converted.classes == ["Forest", "River"] == data.classes


@pytest.mark.parametrize("splits", [("train", "test", "extra"), ("train", "test")])
def test_svhn(splits, tmp_path):
    svhn(tmp_path / "source", splits)
    converted = run("svhn", tmp_path / "source", tmp_path / "out")
    assert tuple(converted.splits) == splits and converted.classes == list("0123456789")
    assert converted.pretraining == "train" and converted.image_size == 32
    for split in splits:
        data = torchvision.datasets.SVHN(tmp_path / "source", split)
        file = Beton(tmp_path / "out" / f"{split}.beton")
        same_as_torchvisions(file, [data[i] for i in range(len(data))], tmp_path)
        assert file.labels.tolist() == [1, 0, 3, 9, 0]


def test_flowers_of_a_torchvision_without_their_names(tmp_path, monkeypatch):
    flowers102(tmp_path / "source")
    monkeypatch.delattr(torchvision.datasets.Flowers102, "classes", raising=False)
    assert run("flowers102", tmp_path / "source", tmp_path / "out").classes[::101] == ["1", "102"]


@pytest.mark.parametrize("name", transfer_sets.LAYOUTS)
def test_what_is_missing_is_named(name, tmp_path):
    layout = transfer_sets.LAYOUTS[name]
    message = refusal(name, tmp_path, tmp_path / "out")
    assert f"looked for {layout.folder}/" in message and layout.cls in message and f"--name {name}" in message
    assert "--root must name" in refusal(name, None, tmp_path / "out")


def test_svhn_is_downloaded_where_missing(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.svhn.download_url", unreachable)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: False)
    message = refusal("svhn", None, tmp_path / "out")
    assert "looked for train_32x32.mat, and the download failed (no network)" in message


def test_every_layout_is_a_data_set_of_the_catalog():
    assert {name for name, entry in CATALOG.items() if entry.source == "transfer"} == transfer_sets.LAYOUTS.keys()
    assert {*MAKERS, "eurosat"} == transfer_sets.LAYOUTS.keys()
