"""Images in tar shards: their order, splits and labels, what is refused, and that they equal those of other sources."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import re
import shlex
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from ssl_dist import cli
from ssl_dist.convert import shards
from ssl_dist.convert.sources import open_source
from ssl_dist.data import file_names, manifest
from ssl_dist.data.beton import Beton
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from tests import kills, make_shards
from tests.conversions import refusal, run
from tests.make_images import jpeg, picture, save
from tests.test_own_photos import exif

KINDS = {
    "folder": make_shards.folder,
    "webdataset": make_shards.shards,
    "parquet": make_shards.parquet,
    "huggingface": make_shards.saved,
}


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def some_images(count=20, classes=2):
    """Two splits of photos of all sizes and kinds, some on their side, in the order of their classes."""
    splits = {}
    for s, split in enumerate(("train", "test")):
        rows = []
        for i in range(count):
            pixels = picture(50 + 7 * i, 90, 100 * s + i)
            data = png(pixels) if i % 3 == 0 else jpeg(pixels, **({"exif": exif(6)} if i % 3 == 1 else {}))
            rows.append((data, "png" if i % 3 == 0 else "jpg", i * classes // count))
        splits[split] = rows
    return splits


def members(count=4, label=lambda i: i % 2, start=0, suffix="jpg"):
    rows = []
    for i in range(start, start + count):
        rows += [(f"{i:03d}.{suffix}", jpeg(picture(40, 30, i)))]
        rows += [(f"{i:03d}.cls", str(label(i)).encode())] if label is not None else []
    return rows


def listed(root, *arguments, **options):
    """Split -> (name, label) of every image."""
    splits = open_source("webdataset", root, None, *arguments, **options).splits
    return {split: list(zip(part.names, part.labels.tolist(), strict=True)) for split, part in splits.items()}


# ------------------------------------------------------------------------------------------------------- all sources


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for kind, write in KINDS.items():
        write(root / kind, some_images())
    return root


def test_the_same_images_from_every_source_are_the_same_files(written, tmp_path, capsys):
    """Order, pixels, untouched bytes of JPEG, orientation and labels, by one thread and by several."""
    records = {}
    for kind in KINDS:
        for workers in (1, 3):
            out = tmp_path / f"{kind}-{workers}"
            converted = run(kind, written / kind, out, name="mine", workers=workers)
            records[kind, workers] = [
                (r.sha256, r.tables, r.contents, r.turned, r.class_counts) for r in converted.splits.values()
            ]
            assert converted.classes == ["class0", "class1"] and list(converted.splits) == ["train", "test"]
            assert (out / "train.beton").read_bytes() == (tmp_path / "folder-1" / "train.beton").read_bytes()
    assert len({str(record) for record in records.values()}) == 1
    assert [turned for *_, turned, _ in records["folder", 1]] == [7, 7]
    lines = {kind: Dataset(tmp_path / f"{kind}-1").files("train")[13] for kind in KINDS}
    assert lines == {
        "folder": "train/class1/0013.jpg",
        "webdataset": "mine-train-0001.tar/0013.jpg",
        "parquet": "data/train-00001-of-00002.parquet/3/0013.jpg",
        "huggingface": "train/data-00001-of-00002.arrow/3/0013.jpg",
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_a_second_conversion_keeps_what_is_the_same_and_notices_what_is_not(kind, tmp_path, capsys):
    images = some_images(count=6)
    source, out = KINDS[kind](tmp_path / "source", images), tmp_path / "out"
    first = run(kind, source, out)
    for recheck, compared in ((False, "names, sizes and times"), (True, "the bytes")):
        assert run(kind, source, out, recheck=recheck, progress=True) == first
        assert capsys.readouterr().err.count(f"complete, kept: {compared}") == 2
    os.rename(source, tmp_path / "before")
    images["train"][2] = (jpeg(picture(100, 100, 77)), images["train"][2][1], images["train"][2][2])
    KINDS[kind](source, images)
    second = run(kind, source, out, progress=True)
    said = capsys.readouterr().err
    assert "train.beton: the images of the source are others" in said and "test.beton: complete, kept" in said
    assert second.splits["train"].sha256 != first.splits["train"].sha256
    assert second == run(kind, source, tmp_path / "anew", name="source")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet"])  # that is read by the thread that writes; the others take seconds, too
def test_killed_at_any_change(kind, tmp_path):
    """The same command makes the same folder of what a kill has left."""
    images = {"train": [(png(picture(8, 8, i)), "png", 0) for i in range(2)]}
    source, whole = KINDS[kind](tmp_path / "source", images), tmp_path / "whole"
    run(kind, source, whole, name="mine")
    (tmp_path / "old" / "out").mkdir(parents=True)
    names = sorted(os.listdir(whole))
    for out in kills.every_kill(tmp_path / "old" / "out", tmp_path, lambda out: run(kind, source, out, name="mine")):
        run(kind, source, out, name="mine")
        assert sorted(os.listdir(out)) == names
        assert [(out / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]


def test_images_of_other_channels_from_every_source_are_the_same_files(tmp_path):
    """Arrays of 16 bits, under .npy in the tars and as bytes in the tables."""
    images, checksums = {"train": []}, set()
    for i in range(6):
        file = io.BytesIO()
        np.save(file, np.random.default_rng(i).integers(0, 60_000, (8, 9, 5), np.uint16))
        images["train"].append((file.getvalue(), "npy", i // 3))
    for kind, write in KINDS.items():
        converted = run(kind, write(tmp_path / kind, images), tmp_path / "out" / kind, channels=5)
        assert (converted.encoding.channels, converted.encoding.bits) == (5, 16)
        checksums.add(converted.splits["train"].sha256)
    assert len(checksums) == 1
    message = refusal("webdataset", tmp_path / "webdataset", tmp_path / "none")
    assert message.endswith("the sample holds no image, only .cls, .json, .npy; --channels N reads arrays of images")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_damaged_images_are_named_and_can_be_left_out(kind, tmp_path):
    images = some_images(count=6)
    images["test"][4] = (images["test"][4][0][:300], *images["test"][4][1:])
    source = KINDS[kind](tmp_path / "source", images)
    message = refusal(kind, source, tmp_path / "out")
    assert "0004.jpg: can not be read as an image" in message and "--skip-damaged" in message
    record = run(kind, source, tmp_path / "out", skip_damaged=True).splits["test"]
    [name] = record.skipped
    assert name.endswith("/0004.jpg") and record.count == 5
    assert name not in Dataset(tmp_path / "out").files("test")


def test_images_in_two_splits_are_said(tmp_path, capsys):
    images = some_images(count=4)
    images["test"][1] = images["train"][0]
    run("webdataset", make_shards.shards(tmp_path / "source", images), tmp_path / "out", progress=True)
    said = capsys.readouterr().err
    assert "test: 1 of its 4 images are in train, too" in said and "mine-test-0000.tar/0001.png for one" in said


@pytest.mark.parametrize(("asked", "kind"), [*itertools.permutations(KINDS, 2)])
def test_another_kind_of_source_is_told_the_command(kind, asked, written, tmp_path, capsys):
    """The command of the message does it."""
    message = refusal(asked, written / kind, tmp_path / "out", name="mine")
    program, *words = shlex.split(message.split("`")[1])
    assert program == "ssl-dist" and words[1] == kind and cli.main(words) == 0
    assert manifest.load(tmp_path / "out").name == "mine"


def test_a_set_of_the_catalog_in_shards_is_told_the_command(written, tmp_path):
    message = refusal("imagenet", written / "webdataset", tmp_path / "out")
    _, *words = shlex.split(message.split("`")[1])
    assert words[:2] == ["convert", "webdataset"] and cli.main(words) == 0
    converted = manifest.load(tmp_path / "out")
    assert converted.name == "imagenet" and converted.image_size == 224 and converted.encoding.orientation == "ignored"


# ------------------------------------------------------------------------------------------------- files and splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("imagenet1k-train-0000.tar imagenet1k-train-0001.tar imagenet1k-validation-00.tar", {"train": 2, "val": 1}),
        ("train/0.tar train/1.tar test/0.tar", {"train": 2, "test": 1}),  # clip_benchmark
        ("data/train-000.tar data/dev-000.tar data/eval-000.tar", {"train": 1, "val": 1, "test": 1}),
        ("training/a/0.tar training/b/0.tar Valid/0.tar", {"train": 2, "val": 1}),
        ("train/train_test.tar test/train_test.tar", {"train": 1, "test": 1}),  # the folder counts
        ("00000.tar 00001.tar", {"train": 2}),
        ("a/00000.tar b/00001.tar", {"train": 2}),
        ("cc3m_unlabeled_000.tar cc3m_train2017.tar", {"unlabeled": 1, "train": 1}),
        ("train-00000-of-00002.tar train-00001-of-00002.tar extra-00000-of-00001.tar", {"train": 2, "extra": 1}),
        ("part-00000-of-00002.tar part-00001-of-00002.tar", {"train": 2}),
        ("restrained.tar detest.tar", {"train": 2}),  # words, not letters
    ],
)
def test_names_tell_the_splits(tmp_path, names, splits):
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = shards.find(tmp_path, ".tar")
    assert {split: len(files) for split, files in found.splits.items()} == splits
    assert all(files == sorted(files) for files in found.splits.values())
    everything = shards.find(tmp_path, ".tar", unlabeled=True).splits
    assert everything == {"unlabeled": sorted(names.split())}


@pytest.mark.parametrize(
    ("names", "words", "remedy"),
    [
        ("train_test.tar", "'train_test.tar' names the splits test and train", None),
        ("a/train.tar b/train.tar", "the split train lies in a/ and in b/", "--root {}/b"),
        ("t-00000-of-00003.tar t-00002-of-00003.tar", "1 of 3 files are missing, t-00001-of-00003", "--root '{}/t*'"),
        ("t-00000-of-00002.tar t-00001-of-00002.tar t-00000-of-00001.tar", "two versions of one data set", None),
        ("a.txt", "holds no .tar file", None),
    ],
)
def test_files_that_make_no_splits(tmp_path, names, words, remedy):
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        shards.find(tmp_path, ".tar")
    if remedy is not None:
        assert remedy.format(tmp_path) in str(caught.value)
        shards.find(tmp_path / remedy.format(tmp_path).split()[1].strip("'"), ".tar")


@pytest.mark.parametrize(("to", "splits"), [("val/val-0.tar", ["train", "val"]), ("training/1.tar", ["train"])])
def test_a_file_and_its_folder_that_name_two_splits(tmp_path, to, splits):
    """It is not of the folder's split without a word, and either remedy makes it of one."""
    for name in ("training", "val"):
        (tmp_path / name).mkdir()
    for name in ("train-0.tar", "val-0.tar"):
        (tmp_path / "training" / name).touch()
    with pytest.raises(UserError) as caught:
        shards.find(tmp_path, ".tar")
    assert str(caught.value) == (
        f"{tmp_path}/training/val-0.tar: its folder 'training' names the split train, and its own name val; put it "
        "into a folder val/, or if it is of train, rename it without that word"
    )
    (tmp_path / "training" / "val-0.tar").rename(tmp_path / to)
    assert list(shards.find(tmp_path, ".tar").splits) == splits


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.tar.gz", gzip.compress),
        ("x.tgz", gzip.compress),
        ("x.tar", gzip.compress),
        ("x.tar.bz2", bz2.compress),
        ("x.tar", bz2.compress),
        ("x.tar.xz", lzma.compress),
    ],
)
def test_a_compressed_tar_is_refused_and_the_command_helps(tmp_path, name, pack):
    plain = make_shards.tar(tmp_path / "plain.tar", members(2))
    (tmp_path / "in dir").mkdir()
    (tmp_path / "in dir" / name).write_bytes(pack(plain.read_bytes()))
    message = refusal("webdataset", tmp_path / "in dir", tmp_path / "out")
    assert f"{name}: a compressed tar, of which no image can be read alone; unpack it: `" in message
    command = message.split("`")[1]
    if shutil.which(command.split()[0 if "&&" not in command else command.split().index("&&") + 1]):
        subprocess.run(command, shell=True, check=True)
        assert len(listed(tmp_path / "in dir")["train"]) == 2


def test_an_unpacked_tar_may_lie_beside_the_compressed_one(tmp_path):
    (tmp_path / "a.tar").touch()
    (tmp_path / "a.tar.gz").touch()
    assert shards.find(tmp_path, ".tar").splits == {"train": ["a.tar"]}


def test_patterns(tmp_path):
    for number in range(12):
        make_shards.tar(tmp_path / "in" / f"x-train-{number:02d}.tar", members(2, start=number))
    make_shards.tar(tmp_path / "in" / "x-val-00.tar", members(2))
    root = tmp_path / "in"
    for pattern, counts in {
        "x-train-{03..10}.tar": {"train": 16},
        "x-{train,val}-{00..00}.tar": {"train": 2, "val": 2},
        "x-*-0?.tar": {"train": 20, "val": 2},
        "x-val-00.tar": {"val": 2},
    }.items():
        assert {split: len(rows) for split, rows in listed(root / pattern).items()} == counts
    assert [name for name, _ in listed(root / "*-{00,01}.tar")["train"]][1:3] == [
        "x-train-00.tar/001.jpg",
        "x-train-01.tar/001.jpg",
    ]
    assert run("webdataset", root / "x-train-*.tar", tmp_path / "out").name == "in"
    for pattern, words in {
        "x-train-{09..13}.tar": "x-train-12.tar: there is no such file",
        "y-*.tar": "y-*.tar: there is no such file",
        "x-train-{9..3}.tar": "{9..3} must go up",
        "x-{train}.tar": "{train} is neither {000..127} nor {a,b}",
        "y.tar": "no such folder, file or pattern",
    }.items():
        assert words in refusal("webdataset", root / pattern, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_links_and_hidden_files(tmp_path):
    """A snapshot of the hub is a folder of links; what macOS adds is passed over."""
    make_shards.tar(tmp_path / "blobs" / "abc", [("._000.jpg", b"mac"), ("__MACOSX/._0.jpg", b"mac"), *members(2)])
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    (tmp_path / "in" / ".cache" / "x.tar").touch()
    (tmp_path / "in" / "train.tar").symlink_to(tmp_path / "blobs" / "abc")
    source = open_source("webdataset", tmp_path / "in")
    assert source.splits["train"].names == ["train.tar/000.jpg", "train.tar/001.jpg"]
    assert any(line.startswith("hidden files") and ".cache" in line for line in source.left_out)
    assert any("members whose names make no sample: 2 .jpg" in line for line in source.left_out)


# ------------------------------------------------------------------------------------------------------------ labels


def test_labels_of_cls_and_their_names(tmp_path):
    make_shards.tar(tmp_path / "a.tar", members(3, label=lambda i: 2 * i))
    source = open_source("webdataset", tmp_path)
    assert source.classes == ["0", "1", "2", "3", "4"] and source.splits["train"].labels.tolist() == [0, 2, 4]
    assert source.notes == ["2 of the classes 0 to 4 have no image, 1 for one"]
    (tmp_path / "classnames.txt").write_text("a\nb\nc\nd\ne\nf\n")
    assert open_source("webdataset", tmp_path).classes == list("abcdef")
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    assert "the label 4: there are 2 class names" in refusal("webdataset", tmp_path, tmp_path / "out")


def with_json(values):
    rows = []
    for i, value in enumerate(values):
        rows += [(f"{i}.jpg", jpeg(picture(9, 9, i))), (f"{i}.json", json.dumps({"kind": value, "n": i}).encode())]
    return rows


def test_labels_of_json(tmp_path):
    make_shards.tar(tmp_path / "train.tar", with_json(["cat", "ant", "cat"]))
    make_shards.tar(tmp_path / "val.tar", with_json(["ant"]))
    source = open_source("webdataset", tmp_path, label_key="kind")
    assert source.classes == ["ant", "cat"] and source.splits["train"].labels.tolist() == [1, 0, 1]
    assert source.splits["val"].labels.tolist() == [0]
    assert open_source("webdataset", tmp_path, label_key="n").splits["train"].labels.tolist() == [0, 1, 2]
    without = open_source("webdataset", tmp_path)
    assert list(without.splits) == ["unlabeled", "val"] and without.classes == []
    assert any("--label-key takes one of the keys of the .json: kind, n" in line for line in without.notes)
    message = refusal("webdataset", tmp_path, tmp_path / "out", label_key="x")
    assert "train.tar: 0.json: has no --label-key 'x', but kind, n" in message
    make_shards.tar(tmp_path / "val.tar", with_json(["bee"]))
    assert "val: 'bee', a class that train does not have" in refusal(
        "webdataset", tmp_path, tmp_path / "out", label_key="kind"
    )


@pytest.mark.parametrize("text", [b"[1, 2]", b"{", b"\xff", b'"x"'])
def test_json_without_keys(tmp_path, text):
    """Boxes, say: refused where a label is to be in it, and else of no interest."""
    rows = [("0.jpg", jpeg(picture(9, 9))), ("0.json", text)]
    make_shards.tar(tmp_path / "in" / "train.tar", rows)
    message = refusal("webdataset", tmp_path / "in", tmp_path / "out", label_key="kind")
    assert "train.tar: 0.json: no JSON with keys; leave all labels with --unlabeled" in message
    assert run("webdataset", tmp_path / "in", tmp_path / "out").splits["unlabeled"].count == 1
    make_shards.tar(tmp_path / "in" / "train.tar", [*rows, ("0.cls", b"0")])
    assert run("webdataset", tmp_path / "in", tmp_path / "out").splits["train"].labelled


def test_a_key_of_json_that_is_not_there(tmp_path):
    make_shards.tar(tmp_path / "in" / "train.tar", members(2))
    message = refusal("webdataset", tmp_path / "in", tmp_path / "out", label_key="kind")
    assert "train.tar/000.jpg: has no .json, as 2 of 2 samples of its split" in message


def test_a_tar_of_class_folders(tmp_path):
    """As data sets are packed: the images are taken, and where the labels are is said."""
    save(tmp_path / "flat" / "train" / "cat" / "1.jpg", picture(9, 9))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "flat", ".")
    source = open_source("webdataset", tmp_path / "images.tar")
    assert source.splits["unlabeled"].names == ["images.tar/./train/cat/1.jpg"]
    assert "samples lie in folders, train/cat/ for one; where these are classes, unpack" in source.notes[0]
    assert any("links, folders or sparse files: 3 in all" in line for line in source.left_out)


@pytest.mark.parametrize("value", [1.5, True, [1], {"a": 1}, -7, 10**30])
def test_json_that_is_no_label(tmp_path, value):
    make_shards.tar(tmp_path / "train.tar", with_json([0, value]))
    message = refusal("webdataset", tmp_path, tmp_path / "out", label_key="kind")
    assert "train.tar: 1.json: kind = " in message and "another --label-key" in message
    assert len(run("webdataset", tmp_path, tmp_path / "out", label_key="n").classes) == 2


@pytest.mark.parametrize("text", ["cat", "1.0", "", "-3", "1 2", "9" * 30])
def test_cls_that_is_no_number(tmp_path, text):
    make_shards.tar(tmp_path / "in" / "train.tar", members(2, label=lambda i: text if i else 0))
    message = refusal("webdataset", tmp_path / "in", tmp_path / "out")
    assert f"train.tar: 001.cls: the label {text!r} is no whole number" in message and "--unlabeled" in message
    converted = run("webdataset", tmp_path / "in", tmp_path / "out", unlabeled=True)
    assert converted.splits["unlabeled"].count == 2 and not converted.splits["unlabeled"].labelled


def test_ids_are_no_labels(tmp_path):
    make_shards.tar(tmp_path / "in" / "train.tar", members(2, label=lambda i: 10**9 + i))
    assert "the label 1000000001: at most 100000 classes" in refusal("webdataset", tmp_path / "in", tmp_path / "out")


def test_without_labels_all_is_the_split_unlabeled(tmp_path, capsys):
    make_shards.tar(tmp_path / "in" / "cc3m-train-000.tar", members(label=None))
    converted = run("webdataset", tmp_path / "in", tmp_path / "out", progress=True)
    assert list(converted.splits) == ["unlabeled"] and converted.pretraining == "unlabeled"
    assert "train: its images have no labels, so it is the split unlabeled" in capsys.readouterr().err
    make_shards.tar(tmp_path / "in" / "cc3m-train-001.tar", members(2))
    message = refusal("webdataset", tmp_path / "in", tmp_path / "none")
    assert "cc3m-train-000.tar/000.jpg: has no .cls, as 4 of 6 samples of its split" in message
    assert run("webdataset", tmp_path / "in", tmp_path / "none", unlabeled=True).splits["unlabeled"].count == 6


def test_a_test_split_without_labels_evaluates_nothing(tmp_path):
    for split, label in (("train", 0), ("val", 0), ("test", -1)):
        make_shards.tar(tmp_path / "in" / f"{split}.tar", members(2, label=lambda i, label=label: label))
    converted = run("webdataset", tmp_path / "in", tmp_path / "out")
    assert list(converted.splits) == ["train", "val", "test"] and converted.evaluation == "val"
    assert Dataset(tmp_path / "out").uses.evaluation == "val"


# ------------------------------------------------------------------------------------------- what a sample is made of


def test_other_members_are_counted_and_nothing_is_unpickled(tmp_path, monkeypatch, capsys):
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    data = pickle.dumps(Bomb())
    rows = [(name, part) for name, part in members(2) for name, part in ((name, part), (f"{name[:3]}.txt", b"a"))]
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    make_shards.tar(
        tmp_path / "in" / "train.tar",
        [*rows, ("001.pyd", data), ("001.emb.pth", data), ("002.jpg", jpeg(picture(9, 9)))],
    )
    make_shards.tar(tmp_path / "in" / "val.tar", [("__meta__/info.pkl", data), *members(2)])
    message = refusal("webdataset", tmp_path / "in", tmp_path / "out")
    assert "train.tar/002.jpg: has no .cls, as 1 of 3" in message
    run("webdataset", tmp_path / "in", tmp_path / "out", unlabeled=True, progress=True)
    said = capsys.readouterr().err
    assert "members with pickled objects, which are never opened: 1 .pyd, 1 .emb.pth" in said
    assert "other members of samples: 2 .txt" in said and "members whose names make no sample: 1 .pkl" in said


def test_a_sample_without_an_image(tmp_path):
    rows = [*members(2), ("002.cls", b"1"), ("002.txt", b"a photo"), *members(1, start=3)]
    make_shards.tar(tmp_path / "in" / "train.tar", rows)
    message = refusal("webdataset", tmp_path / "in", tmp_path / "out")
    assert "train.tar/002: can not be read (the sample holds no image, only .cls, .txt)" in message
    record = run("webdataset", tmp_path / "in", tmp_path / "out", skip_damaged=True).splits["train"]
    assert list(record.skipped) == ["train.tar/002"] and record.count == 3


def test_which_image_of_a_sample(tmp_path):
    row = [("0.input.jpg", jpeg(picture(9, 9, 1))), ("0.mask.png", png(picture(9, 9, 2))), ("0.cls", b"0")]
    make_shards.tar(tmp_path / "in" / "train.tar", row)
    message = refusal("webdataset", tmp_path / "in", tmp_path / "out")
    assert "train.tar/0: the sample holds no image, only .input.jpg, .mask.png, .cls; a name ends at" in message
    assert message.endswith("--image-key input.jpg")
    run("webdataset", tmp_path / "in", tmp_path / "out", image_key="input.jpg")
    assert Dataset(tmp_path / "out").files("train") == ["train.tar/0.input.jpg"]
    make_shards.tar(tmp_path / "in" / "train.tar", [("0.png", row[1][1]), *members(1), ("000.webp", row[0][1])])
    message = refusal("webdataset", tmp_path / "in", tmp_path / "out")
    assert "the sample '000' holds 2 images, .jpg and .webp; name one: --image-key jpg" in message


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
def test_keys_are_of_shards_alone(kind, tmp_path):
    for key in ("image_key", "label_key"):
        message = refusal(kind, tmp_path, tmp_path / "out", **{key: "x"})
        assert f"--{key.replace('_', '-')} 'x': only of webdataset, parquet, huggingface" in message


def test_samples_that_come_twice(tmp_path):
    def message(rows):
        make_shards.tar(tmp_path / "in" / "train.tar", rows)
        return refusal("webdataset", tmp_path / "in", tmp_path / "out")

    rows = members(2)
    assert "train.tar: 000.jpg: the sample '000' has two of it" in message([rows[0], *rows])
    assert "train.tar: 000.JPG: the sample '000' has two of it" in message([rows[0], ("000.JPG", b""), *rows[1:]])
    apart = [*rows[0::2], *rows[1::2]]
    assert "train.tar: 000.cls: the sample '000' stands in two places" in message(apart)
    assert "--sort=name" in message(apart)
    make_shards.tar(tmp_path / "in" / "train.tar", sorted(apart))
    make_shards.tar(tmp_path / "in" / "val.tar", sorted(apart))  # the same keys in another shard are others
    assert run("webdataset", tmp_path / "in", tmp_path / "out").splits["val"].count == 2


# ------------------------------------------------------------------------------------------------------ damaged tars


def test_a_tar_that_was_cut_at_any_byte(tmp_path):
    """Refused with the shard and the member, or, where it ends between two members, said."""
    whole = make_shards.tar(tmp_path / "whole.tar", members(3)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    path = tmp_path / "in" / "train.tar"
    path.parent.mkdir()
    outcomes = {"said": 0, "refused": 0}
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = [member.offset for member in archive] + [-(-end // 512) * 512]
    for size in {*range(0, end + 1024, 211), *starts, *(start + 512 for start in starts)}:
        path.write_bytes(whole[:size])
        try:
            source = open_source("webdataset", tmp_path / "in")
        except UserError as error:
            assert str(error).startswith(str(path)) and ("fetch it again" in str(error) or "has no .cls" in str(error))
            outcomes["refused"] += 1
            continue
        number = len(source.splits["train"].names if "train" in source.splits else source.splits["unlabeled"].names)
        ended = [line for line in source.notes if "has no mark of a tar's end behind" in line]
        assert bool(ended) == (size in starts) and (ended or number == 3), size
        outcomes["said"] += bool(ended)
    assert outcomes["said"] >= 3 and outcomes["refused"] > 10


def test_tars_that_are_none(tmp_path):
    good = make_shards.tar(tmp_path / "good.tar", members(3)).read_bytes()
    cases = {
        "no whole tar": [b"", b"hello", good[:512].replace(b"000.jpg", b"000.jpx"), os.urandom(4096)],
        "a pointer of git-lfs, not the file; fetch the files with `git lfs pull`": [
            shards.LFS_POINTER + b"v1\noid x\n"
        ],
        "holds no sample": [bytes(10240)],
        "unpack these tars": [make_shards.tar(tmp_path / "t.tar", [("n01.tar", good), ("n02.tar", good)]).read_bytes()],
        "damaged or cut behind 000.jpg": [good[: good.index(b"000.cls")] + b"x" * 512 + bytes(1024)],
    }
    (tmp_path / "in").mkdir()
    for words, files in cases.items():
        for data in files:
            (tmp_path / "in" / "train.tar").write_bytes(data)
            message = refusal("webdataset", tmp_path / "in", tmp_path / "out")
            assert words in message and "train.tar" in message
    assert not (tmp_path / "out").exists()


def test_a_size_that_leads_back_is_no_circle(tmp_path):
    """A folder of -1024 bytes, in the binary form of GNU tar: the next header would be the one before it."""
    header = bytearray(tarfile.TarInfo("a/").tobuf())
    header[124:136], header[156:157] = (2**96 - 1024).to_bytes(12, "big"), b"0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "train.tar").write_bytes(tarfile.TarInfo("b/").tobuf() + header + bytes(10240))
    message = refusal("webdataset", tmp_path, tmp_path / "out")
    assert "train.tar: no whole tar: a size below 0, at a" in message


def test_what_follows_the_end_of_a_tar_is_said(tmp_path):
    path = make_shards.tar(tmp_path / "train.tar", members(2))
    path.write_bytes(path.read_bytes() + make_shards.tar(tmp_path / "b.tar", members(2, start=2)).read_bytes())
    os.remove(tmp_path / "b.tar")
    [note] = open_source("webdataset", tmp_path).notes
    assert note == f"{path}: bytes behind the tar's end are not read; join tars with `tar --concatenate`"


def test_links_in_a_tar_are_not_followed(tmp_path):
    rows = members(2)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, data in rows:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"9{kind.decode()}.jpg")
            member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "000.jpg"
            archive.addfile(member)
    source = open_source("webdataset", tmp_path)
    assert len(source.splits["train"].names) == 2
    assert any("links, folders or sparse files: 2 in all" in line for line in source.left_out)


def test_a_name_that_is_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    rows = [(f"{name}.jpg", jpeg(picture(9, 9))), (f"{name}.cls", b"0")]
    make_shards.tar(tmp_path / "in" / "train.tar", rows)
    run("webdataset", tmp_path / "in", tmp_path / "out")
    [line] = Dataset(tmp_path / "out").files("train")
    assert line == "train.tar/caf\\xe9.jpg" and file_names.unescaped(line) == f"train.tar/{name}.jpg"


def test_a_shard_that_is_cut_during_the_conversion(tmp_path):
    path = make_shards.tar(tmp_path / "in" / "train.tar", members(3))
    images = open_source("webdataset", tmp_path / "in").splits["train"]
    os.truncate(path, 1024)
    with pytest.raises(ValueError, match="the shard was cut"):
        images.load(2)


def test_an_empty_shard_among_others(tmp_path):
    make_shards.tar(tmp_path / "in" / "train-0.tar", [("0.input.jpg", jpeg(picture(9, 9)))])
    make_shards.tar(tmp_path / "in" / "train-1.tar", [])
    assert "--image-key input.jpg" in refusal("webdataset", tmp_path / "in", tmp_path / "out")
    assert len(listed(tmp_path / "in", image_key="input.jpg")["unlabeled"]) == 1


def test_many_shards_in_order(tmp_path):
    """Ids go through the shards by name and through each as it stands, and pixels are those of the members."""
    rng, rows = np.random.default_rng(0), {}
    for number in rng.permutation(9):
        order = rng.permutation(6)
        for i in order:
            pixels = np.full((8, 8, 3), 10 * number + i, np.uint8)
            rows.setdefault(f"s{number}.tar", []).extend([(f"{i}.png", png(pixels)), (f"{i}.cls", b"%d" % i)])
        make_shards.tar(tmp_path / "in" / f"s{number}.tar", rows[f"s{number}.tar"])
    run("webdataset", tmp_path / "in", tmp_path / "out")
    file = Beton(tmp_path / "out" / "train.beton")
    expected = [10 * int(name[1]) + int(member[0]) for name in sorted(rows) for member, _ in rows[name][::2]]
    assert [int(file.sample(i)[0]) for i in range(file.count)] == expected
    assert file.labels.tolist() == [value % 10 for value in expected]


def test_help_for_one_name(tmp_path):
    save(tmp_path / "in" / "a.png", picture(5, 5))
    assert "did you mean 'webdataset'" in refusal("webdatasets", tmp_path / "in", tmp_path / "out")
