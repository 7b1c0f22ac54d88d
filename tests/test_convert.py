"""Conversion: what is stored, in which order, with which dataset.json; killed and repeated; and every mistake."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from ssl_dist.convert.command import convert
from ssl_dist.data import manifest
from ssl_dist.data.beton import JPG, RAW, Beton
from tests.conversions import refusal, run, shown
from tests.make_images import jpeg, odd_folder, picture, save, simple_folder


def checksums(out):
    return {split: facts.sha256 for split, facts in manifest.load(out).splits.items()}


# ------------------------------------------------------------------------------------------------ what is stored


def test_pictures_of_every_kind(tmp_path):
    """Small ones as pixels; JPEG files keep their bytes; the others become RGB, shrunk to the maximal side."""
    source = odd_folder(tmp_path / "source")
    run("folder", source, tmp_path / "out", max_side=180)
    file = Beton(tmp_path / "out" / "train.beton")
    files = [Path(path) for path, _ in torchvision.datasets.ImageFolder(source / "train").samples]
    assert [path.name for path in files][:3] == ["a.jpg", "b.JPEG", "c.png"] and file.count == len(files)
    for i, path in enumerate(files):
        picture_there = Image.open(path).convert("RGB")
        longer = max(picture_there.size)
        here = shown(file, i, tmp_path)
        assert file.modes[i] == (RAW if longer <= 64 else JPG), path
        if longer > 180:
            width, height = (max(1, round(side * 180 / longer)) for side in picture_there.size)
            shrunk = np.asarray(picture_there.resize((width, height), Image.Resampling.LANCZOS))
            assert file.sample(i).tobytes() == jpeg(shrunk, quality=95) and max(here.shape) == 180
        elif path.name in ("a.jpg", "f.jpg"):
            assert file.sample(i).tobytes() == path.read_bytes()
        elif longer <= 64:
            assert (here == np.asarray(picture_there)).all()
        else:
            assert file.sample(i).tobytes() == jpeg(np.asarray(picture_there), quality=95)


def test_order_and_labels_are_torchvisions(tmp_path):
    source = odd_folder(tmp_path / "source")
    dataset = run("folder", source, tmp_path / "out")
    reference = torchvision.datasets.ImageFolder(source / "train")
    assert dataset.classes == reference.classes
    assert Beton(tmp_path / "out" / "train.beton").labels.tolist() == reference.targets


def test_the_manifest(tmp_path):
    dataset = run("folder", odd_folder(tmp_path / "birds"), tmp_path / "out")
    assert dataset == manifest.load(tmp_path / "out") and dataset.name == "birds"
    assert list(dataset.splits) == ["train", "val"]
    assert (dataset.pretraining, dataset.training, dataset.evaluation) == ("train", "train", "val")
    train = dataset.splits["train"]
    assert (train.count, train.labelled, train.class_counts) == (11, True, [5, 6])
    assert (train.max_height, train.max_width, train.raw + train.jpeg) == (150, 300, 11)
    assert train.raw == 2 and train.bytes == (tmp_path / "out" / "train.beton").stat().st_size
    assert sorted(os.listdir(tmp_path / "out")) == [
        "dataset.json",
        "train-files.txt",
        "train.beton",
        "val-files.txt",
        "val.beton",
    ]


def test_mean_and_std(tmp_path):
    source = tmp_path / "source"
    images = [picture(20, 30, 1), picture(12, 40, 2), picture(50, 9, 3)]
    for i, image in enumerate(images):
        save(source / "train" / "x" / f"{i}.png", image)
    dataset = run("folder", source, tmp_path / "out")
    unit = [image.reshape(-1, 3) / 255 for image in images]
    mean = np.mean([pixels.mean(0) for pixels in unit], 0)
    std = np.sqrt(np.mean([(pixels**2).mean(0) for pixels in unit], 0) - mean**2)
    assert np.allclose(dataset.mean, mean, atol=6e-7) and np.allclose(dataset.std, std, atol=6e-7)
    assert dataset.measured_images == 3 and all(value == round(value, 6) for value in dataset.mean + dataset.std)


def test_mean_and_std_of_evenly_spaced_images(tmp_path, monkeypatch):
    source = simple_folder(tmp_path / "source", per_class=5, splits=("train",))
    monkeypatch.setattr("ssl_dist.convert.statistics.MAX_IMAGES", 4)
    dataset = run("folder", source, tmp_path / "out")
    file = Beton(tmp_path / "out" / "train.beton")
    pixels = np.stack([file.sample(i) for i in (0, 2, 5, 7)]).reshape(-1, 3) / 255
    assert dataset.measured_images == 4
    assert np.allclose(dataset.mean, pixels.mean(0), atol=6e-7) and np.allclose(dataset.std, pixels.std(0), atol=6e-7)


def test_the_number_of_workers_changes_no_byte(tmp_path):
    source = odd_folder(tmp_path / "source")
    outs = [tmp_path / f"out{workers}" for workers in (1, 2, 5)]
    for workers, out in zip((1, 2, 5), outs, strict=True):
        run("folder", source, out, workers=workers, name="same")
    for name in ("train.beton", "val.beton", "dataset.json"):
        assert len({(out / name).read_bytes() for out in outs}) == 1


def test_many_chunks_keep_their_order(tmp_path):
    source = simple_folder(tmp_path / "source", per_class=150, splits=("train",), size=(4, 3))
    run("folder", source, tmp_path / "out", workers=1)  # ten chunks, three under way
    file = Beton(tmp_path / "out" / "train.beton")
    for i in (0, 31, 32, 149, 150, 299):
        expected = picture(4, 3, i % 150 + 10 * (i // 150))
        assert (file.sample(i) == expected.ravel()).all()


def test_folders_of_other_shapes(tmp_path):
    save(tmp_path / "a" / "cats" / "1.png", picture(5, 5))
    save(tmp_path / "a" / "ants" / "1.png", picture(5, 5))
    save(tmp_path / "a" / "ants" / ".1.png", picture(5, 5))
    save(tmp_path / "a" / ".hidden" / "1.png", picture(5, 5))
    dataset = run("folder", tmp_path / "a", tmp_path / "out-a", name="mine")
    assert dataset.classes == ["ants", "cats"] and dataset.name == "mine"
    assert {split: facts.count for split, facts in dataset.splits.items()} == {"train": 2}

    for i in range(3):
        save(tmp_path / "b" / "unlabeled" / "deep" / f"{i}.png", picture(5, 5, i))
    dataset = run("folder", tmp_path / "b", tmp_path / "out-b")
    assert (dataset.pretraining, dataset.classes, dataset.splits["unlabeled"].labelled) == ("unlabeled", [], False)
    assert Beton(tmp_path / "out-b" / "unlabeled.beton").labels.tolist() == [-1, -1, -1]


def test_a_name_of_the_catalog_brings_its_facts(tmp_path):
    dataset = run("folder", simple_folder(tmp_path / "x"), tmp_path / "out", name="cifar10")
    assert (dataset.name, dataset.image_size, dataset.paper_mean) == ("cifar10", 32, [0.491, 0.482, 0.447])
    assert "Krizhevsky" in dataset.about


# ------------------------------------------------------------------------------------------------ again, and killed


@pytest.fixture
def simple(tmp_path):
    source = simple_folder(tmp_path / "source")
    run("folder", source, tmp_path / "out")
    return source, tmp_path / "out"


def identity(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_complete_splits_are_kept(simple, capsys):
    source, out = simple
    before = {name: identity(out / name) for name in ("train.beton", "test.beton")}
    text = (out / "dataset.json").read_text()
    run("folder", source, out, progress=True)
    assert {name: identity(out / name) for name in before} == before
    assert (out / "dataset.json").read_text() == text
    assert capsys.readouterr().err.count("complete, kept") == 2


@pytest.mark.parametrize("what", ["a bit", "cut", "gone"])
def test_a_damaged_split_is_made_again(simple, what):
    source, out = simple
    whole, before = (out / "test.beton").read_bytes(), identity(out / "train.beton")
    start = int(Beton(out / "test.beton").pointers[3])
    damaged = {"a bit": whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :], "cut": whole[:-1000]}
    if what == "gone":
        (out / "test.beton").unlink()
    else:
        (out / "test.beton").write_bytes(damaged[what])
    run("folder", source, out)
    assert (out / "test.beton").read_bytes() == whole and identity(out / "train.beton") == before


def test_another_source_or_size_is_converted_again(simple):
    source, out = simple
    first = checksums(out)
    save(source / "train" / "red" / "new.png", picture(12, 10))
    dataset = run("folder", source, out)
    assert dataset.splits["train"].count == 13 and checksums(out)["test"] == first["test"]
    os.rename(source / "train" / "red" / "new.png", source / "train" / "red" / "000a.png")
    second = checksums(out)
    dataset = run("folder", source, out)
    assert dataset.splits["train"].count == 13 and checksums(out)["train"] not in (first["train"], second["train"])
    dataset = run("folder", source, out, max_side=8)
    assert dataset.encoding.max_side == 8 and dataset.splits["test"].max_height == 8
    assert Beton(out / "test.beton").heights.max() == 8


def test_what_is_not_yet_verified_stays_listed(simple, monkeypatch):
    """A second run that is stopped in the middle loses nothing of the first."""
    source, out = simple
    (out / "train.beton").unlink()

    def stop(*_):
        raise KeyboardInterrupt

    saved = manifest.save
    monkeypatch.setattr(manifest, "save", lambda *a: (saved(*a), stop()))
    with pytest.raises(KeyboardInterrupt):
        run("folder", source, out)
    assert list(manifest.load(out).splits) == ["train", "test"]


def test_another_data_set_is_not_written_over(simple):
    source, out = simple
    message = refusal("folder", source, out, name="other")
    assert "'source'" in message and "'other'" in message


def test_a_damaged_dataset_json_is_made_anew(simple):
    source, out = simple
    whole = (out / "dataset.json").read_text()
    (out / "dataset.json").write_text("{}")
    convert("folder", source, out, progress=False)
    assert (out / "dataset.json").read_text() == whole


SLOWLY = """
import sys, time
from ssl_dist.convert import command, split
encode = split.encode
def slow(*arguments):
    time.sleep(0.02)
    return encode(*arguments)
split.encode = slow
command.convert("folder", sys.argv[1], sys.argv[2], workers=2, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("during", ["train", "test"])
def test_killed_and_repeated(tmp_path, during):
    """SIGKILL in the middle of a split; the same command again finishes with the same bytes."""
    source = simple_folder(tmp_path / "source", per_class=100, size=(8, 8))
    run("folder", source, tmp_path / "whole", name="source")
    out = tmp_path / "out"
    started = subprocess.Popen([sys.executable, "-c", SLOWLY, source, out])
    deadline = time.monotonic() + 60
    while not (out / f".{during}.beton.tmp").exists():
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert (out / f".{during}.beton.tmp").exists() and not (out / f"{during}.beton").exists()
    assert (out / "train.beton").exists() == (during == "test")
    before = identity(out / "train.beton") if during == "test" else None
    run("folder", source, out)
    for name in ("train.beton", "test.beton", "dataset.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert before in (None, identity(out / "train.beton"))
    files = ["test-files.txt", "test.beton", "train-files.txt", "train.beton"]
    assert sorted(os.listdir(out)) == ["dataset.json", *files]


# --------------------------------------------------------------------------------------------------------- mistakes


def test_wrong_names(tmp_path):
    assert "did you mean 'cifar10'" in refusal("cifar-10", tmp_path, tmp_path / "out")
    assert "supercifar100" in refusal("qqq", tmp_path, tmp_path / "out")
    assert "--name" in refusal("digits", None, tmp_path / "out", name="other")
    assert "--root" in refusal("folder", None, tmp_path / "out")
    assert "--root" in refusal("imagenet", None, tmp_path / "out")
    assert "--max-side 0" in refusal("digits", None, tmp_path / "out", max_side=0)
    assert "--workers 0" in refusal("digits", None, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"no picture", id="text"),
        pytest.param(b"", id="empty"),
        pytest.param(jpeg(picture(200, 200), quality=95)[:-300], id="cut JPEG"),
    ],
)
def test_an_unreadable_image_is_named(tmp_path, content):
    root = simple_folder(tmp_path / "source")
    bad = root / "train" / "red" / "002.jpg"
    bad.write_bytes(content)
    message = refusal("folder", root, tmp_path / "out")
    assert message.startswith(f"{bad}: can not be read") and "remove" in message
    assert not (tmp_path / "out").exists()


def test_images_that_do_not_fit_are_named(tmp_path):
    root = simple_folder(tmp_path / "source")
    deep = Image.fromarray(np.full((70, 70), 3000, np.uint16))
    save(root / "train" / "red" / "deep.png", deep)
    message = refusal("folder", root, tmp_path / "out")
    assert "deep.png" in message and "8 bits" in message
    (root / "train" / "red" / "deep.png").unlink()
    (root / "train" / "red" / "lost.png").symlink_to(tmp_path / "nowhere")
    assert "lost.png: can not be read" in refusal("folder", root, tmp_path / "out")


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal("digits", None, tmp_path / "file" / "out")
    assert "--out" in message and "cannot be written" in message


@pytest.fixture
def small_files_only():
    """The operating system refuses to let a file grow beyond 3 MiB, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path, small_files_only):
    message = refusal("folder", simple_folder(tmp_path / "source"), tmp_path / "out")
    assert message.startswith(f"--out {tmp_path / 'out'}: cannot be written: File too large")
    assert os.listdir(tmp_path / "out") == []


def test_progress_without_a_terminal(tmp_path, capsys):
    run("folder", simple_folder(tmp_path / "source"), tmp_path / "out", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "train: converting" in lines[0] and "12/12" in lines[0] and "left" in lines[0]
    run("folder", tmp_path / "source", tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""


def test_dataset_json_is_plain(simple):
    content = json.loads((simple[1] / "dataset.json").read_text())
    assert content["format"] == 1 and len(content["splits"]["train"]["sha256"]) == 64
    assert not list(simple[1].glob(".*"))
