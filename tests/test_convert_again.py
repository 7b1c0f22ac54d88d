"""A conversion of a source that changed or is damaged, and what a killed one leaves."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ssl_dist.convert import command
from ssl_dist.data import manifest
from ssl_dist.data.beton import Beton, Writer
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from tests import kills
from tests.conversions import refusal, run
from tests.make_images import picture, save, simple_folder, tiny_imagenet


@pytest.fixture
def simple(tmp_path):
    source = simple_folder(tmp_path / "source", per_class=3)
    run("folder", source, tmp_path / "out")
    return source, tmp_path / "out"


def stored(out, split="train"):
    """(inode, labels, the samples' bytes) of a split's file."""
    beton = Beton(out / f"{split}.beton")
    samples = [beton.sample(i).tobytes() for i in range(beton.count)]
    return os.stat(beton.path).st_ino, beton.labels.tolist(), samples


def edit(out, change):
    """Change dataset.json: `change` is given its tree."""
    tree = json.loads((out / manifest.FILE).read_text())
    change(tree)
    (out / manifest.FILE).write_text(json.dumps(tree))


# ---------------------------------------------------------------------------------------------- the source has changed


def keeping_times(path, data):
    """Other bytes of the same size, with the times of before as far as programs can set them."""
    state = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def bmp_folder(root):
    """Pictures of one size in bytes and one time."""
    for c, name in enumerate(("blue", "red")):
        for i in range(2):
            path = save(root / "train" / name / f"{i}.bmp", picture(8, 8, 10 * c + i))
            os.utime(path, (10**9, 10**9))
    return root


def exchange(root):
    """The class folders exchange their names."""
    for before, after in (("red", "x"), ("blue", "red"), ("x", "blue")):
        os.rename(root / "train" / before, root / "train" / after)


@pytest.mark.parametrize("how", ["picture", "same size and time", "classes", "link"])
def test_images_that_changed_under_their_names(tmp_path, how, capsys):
    source, out = bmp_folder(tmp_path / "source"), tmp_path / "out"
    if how == "link":
        save(tmp_path / "pool.bmp", picture(8, 8, 70))
        (source / "train" / "red" / "2.bmp").symlink_to(tmp_path / "pool.bmp")
    run("folder", source, out)
    before = stored(out)
    new = picture(8, 8, 99)
    if how == "picture":
        save(source / "train" / "blue" / "0.bmp", new)
    elif how == "same size and time":
        keeping_times(source / "train" / "blue" / "0.bmp", save(tmp_path / "new.bmp", new).read_bytes())
    elif how == "link":
        keeping_times(tmp_path / "pool.bmp", save(tmp_path / "new.bmp", new).read_bytes())
    else:
        exchange(source)
    capsys.readouterr()
    run("folder", source, out, progress=True)
    assert "the images of the source are others" in capsys.readouterr().err
    _, labels, samples = stored(out)
    if how == "classes":
        assert samples == before[2][2:] + before[2][:2] and labels == before[1]
    else:
        assert samples[0 if how != "link" else -1] == new.tobytes()
        assert sum(old != now for old, now in zip(before[2], samples, strict=True)) == 1
    run("folder", source, out, progress=True)
    assert "complete, kept: names, sizes and times" in capsys.readouterr().err


def test_classes_that_exchange_images_of_one_time(tmp_path, monkeypatch):
    """As small files of an archive have, which are written within one tick of the system's clock."""

    def stat(path):
        state = os.lstat(path)
        return SimpleNamespace(st_size=state.st_size, st_mtime_ns=1, st_ctime_ns=1, st_ino=state.st_ino)

    source, out = bmp_folder(tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr("ssl_dist.convert.images.os", SimpleNamespace(stat=stat))
    run("folder", source, out)
    before = stored(out)[2]
    exchange(source)
    run("folder", source, out)
    assert stored(out)[2] == before[2:] + before[:2]


@pytest.mark.parametrize("how", ["touched", "copied"])
def test_images_that_are_the_same_are_kept(simple, tmp_path, how, capsys):
    """Another time or place makes them read; the next run knows these."""
    source, out = simple
    before = stored(out)
    if how == "touched":
        (source / "train" / "red" / "000.png").touch()
    else:
        os.rename(source, tmp_path / "old")
        shutil.copytree(tmp_path / "old", source)
    run("folder", source, out, progress=True)
    assert "train.beton: complete, kept: the bytes of the source's images are as they were" in capsys.readouterr().err
    assert stored(out) == before
    run("folder", source, out, progress=True)
    assert capsys.readouterr().err.count("kept: names, sizes and times") == 2 and stored(out) == before


def test_what_no_time_tells_is_found_by_recheck(simple, monkeypatch, capsys):
    """A file system may keep no times: the line that says `kept` names the option that reads the images."""
    source, out = simple
    monkeypatch.setattr("ssl_dist.convert.images.FileImages.stamps", lambda self: "always the same")
    run("folder", source, out)
    save(source / "train" / "red" / "000.png", picture(12, 10, 99))
    before = stored(out)
    capsys.readouterr()
    run("folder", source, out, progress=True)
    assert capsys.readouterr().err.count("kept: names, sizes and times of the source's images are as they were; ") == 2
    assert stored(out) == before
    run("folder", source, out, recheck=True, progress=True)
    message = capsys.readouterr().err
    assert "train.beton: the images of the source are others" in message
    assert "test.beton: complete, kept: the bytes" in message
    assert picture(12, 10, 99).tobytes() in stored(out)[2]


def test_arrays_and_archives_are_compared_too(tmp_path, capsys):
    run("digits", None, tmp_path / "digits")
    before = stored(tmp_path / "digits")
    run("digits", None, tmp_path / "digits", progress=True)
    assert capsys.readouterr().err.count("kept: the bytes") == 2 and stored(tmp_path / "digits") == before

    folder = tiny_imagenet(tmp_path / "source" / "tiny-imagenet-200")
    archive = tmp_path / "tiny-imagenet-200.zip"
    for expected in ("converting", "kept: names", "are others"):
        shutil.make_archive(str(archive.with_suffix("")), "zip", folder.parent)
        run("tiny-imagenet", archive, tmp_path / "out", progress=True)
        assert f"train: {expected}" in (text := capsys.readouterr().err) or expected in text
        if expected == "kept: names":
            save(folder / "train" / "n01" / "images" / "n01_0.JPEG", picture(64, 64, 99))


def test_a_record_of_before_is_read_and_made_again(simple, capsys):
    """What it can not prove, the bytes of the images, is not taken for proven."""
    source, out = simple
    before = stored(out)
    edit(out, lambda tree: [tree["splits"][s].pop(key) for s in ("train", "test") for key in NEW_KEYS])
    assert Dataset(out, reader="arrays").info("train").count == 6
    capsys.readouterr()
    run("folder", source, out, progress=True)
    assert "was written before the bytes of its images were recorded" in capsys.readouterr().err
    assert stored(out)[1:] == before[1:] and manifest.load(out).splits["train"].contents


NEW_KEYS = ("stamps", "contents", "skipped", "tables")


# -------------------------------------------------------------------------------------- between the file and the record


@pytest.mark.parametrize("of_before", [False, True])
def test_killed_between_the_file_and_the_record(simple, monkeypatch, of_before):
    """The new file stands beside the old record, which has the same number of images: nobody takes them for a pair."""
    source, out = simple
    if of_before:
        edit(out, lambda tree: [tree["splits"][s].pop(key) for s in ("train", "test") for key in NEW_KEYS])
    save(source / "train" / "red" / "000.png", picture(12, 10, 99))
    publish = Writer.publish

    def killed(writer):
        publish(writer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        run("folder", source, out)
    monkeypatch.undo()
    assert picture(12, 10, 99).tobytes() in stored(out)[2]
    with pytest.raises(UserError, match=r"train\.beton: its labels and tables are not those that were written"):
        Dataset(out, reader="arrays").open("train")
    run("folder", source, out)
    whole = out.with_name("whole")
    run("folder", source, whole)
    assert [(out / name).read_bytes() for name in NAMES] == [(whole / name).read_bytes() for name in NAMES]


NAMES = ("dataset.json", "train.beton", "test.beton", "train-files.txt", "test-files.txt")


def test_killed_at_any_change_of_a_conversion_anew(tmp_path):
    """Each split that opens is the old one or the new one, whole, and the same command goes on to the new set."""
    source, prepared, whole = bmp_folder(tmp_path / "source"), tmp_path / "old" / "out", tmp_path / "whole"
    shutil.copytree(source / "train", source / "test")
    run("folder", source, prepared)
    exchange(source)
    save(source / "test" / "red" / "0.bmp", picture(8, 8, 77))
    run("folder", source, whole)
    split_of = {out: {split: stored(out, split)[1:] for split in ("train", "test")} for out in (prepared, whole)}
    refused, opened = 0, set()
    for out in kills.every_kill(prepared, tmp_path, lambda out: run("folder", source, out)):
        dataset = Dataset(out, reader="arrays")
        for split in ("train", "test"):
            try:
                dataset.open(split)
            except UserError as error:
                assert "its labels and tables are not those that were written" in str(error)
                refused += 1
            else:
                opened.add((split, [split_of[o][split] for o in (prepared, whole)].index(stored(out, split)[1:])))
        run("folder", source, out)
        assert [(out / name).read_bytes() for name in NAMES] == [(whole / name).read_bytes() for name in NAMES]
        assert sorted(os.listdir(out)) == sorted(NAMES)
    assert refused and opened == {("train", 0), ("train", 1), ("test", 0), ("test", 1)}


def test_nothing_slow_stands_between_the_file_and_the_record(tmp_path, monkeypatch):
    """Mean and deviation are measured before the file takes its place."""
    measure, publish, save_manifest, calls = command.measure, Writer.publish, manifest.save, []
    monkeypatch.setattr(command, "measure", lambda *a: (calls.append("measure"), measure(*a))[1])
    monkeypatch.setattr(Writer, "publish", lambda *a: (calls.append("publish"), publish(*a))[1])
    monkeypatch.setattr(manifest, "save", lambda *a: (calls.append("save"), save_manifest(*a))[1])
    run("folder", simple_folder(tmp_path / "source", per_class=2), tmp_path / "out")
    assert calls == ["measure", "publish", "save", "publish", "save"]


def test_another_split_for_pretraining_is_measured(tmp_path, capsys):
    """It is kept, and mean and deviation in dataset.json are those of a split that is gone."""
    source, out = simple_folder(tmp_path / "source", per_class=3), tmp_path / "out"
    expected = run("folder", source, out)
    for i in range(3):
        save(source / "unlabeled" / f"{i}.png", picture(8, 8, 50 + i))
    of_unlabeled = run("folder", source, out)
    assert (of_unlabeled.pretraining, of_unlabeled.measured_images) == ("unlabeled", 3)
    shutil.rmtree(source / "unlabeled")
    capsys.readouterr()
    assert run("folder", source, out, progress=True) == expected == manifest.load(out)
    assert "train.beton: complete, kept" in capsys.readouterr().err and of_unlabeled.mean != expected.mean


# --------------------------------------------------------------------------------------------------- damaged images


def damage(source):
    """Three images of the split train, each in another way; the last is a file that was moved away."""
    cut = source / "train" / "blue" / "000.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (source / "train" / "red" / "001.png").write_bytes(b"no picture")
    (source / "train" / "red" / "009.png").symlink_to(source / "nowhere.png")
    return [f"train/{name}.png" for name in ("blue/000", "red/001", "red/009")]


def test_all_damaged_images_are_named_at_once(simple):
    source, out = simple
    before, text = stored(out), (out / manifest.FILE).read_text()
    bad = damage(source)
    message = refusal("folder", source, out)
    assert message.startswith("train: 3 of 7 images can not be converted: ")
    assert all(f"{name} (can not be read" in message for name in bad) and "--skip-damaged" in message
    assert stored(out) == before and (out / manifest.FILE).read_text() == text
    assert sorted(os.listdir(out)) == sorted(NAMES)


def test_damaged_images_can_be_left_out(simple, tmp_path, capsys):
    source, out = simple
    bad = damage(source)
    good = tmp_path / "good"
    shutil.copytree(source, good, symlinks=True)
    for name in bad:
        (good / name).unlink()
    run("folder", good, tmp_path / "without", name="source")
    capsys.readouterr()
    run("folder", source, out, skip_damaged=True, progress=True)
    message = capsys.readouterr().err
    assert "train: 3 of 7 images can not be converted and are left out; dataset.json names all of them" in message
    assert all(f"{source / name}: can not be read" in message for name in bad)
    assert stored(out)[1:] == stored(tmp_path / "without")[1:] and stored(out)[1] == [0, 0, 1, 1]
    record = manifest.load(out).splits["train"]
    assert list(record.skipped) == bad and "truncated" in record.skipped[bad[0]] and record.count == 4
    assert Dataset(out).info("train").count == 4

    inode = stored(out)[0]
    run("folder", source, out, skip_damaged=True, progress=True)
    assert "train.beton: complete, kept: names" in capsys.readouterr().err and stored(out)[0] == inode
    assert "3 of 7" in refusal("folder", source, out)  # who does not ask for it is told again
    assert stored(out)[0] == inode
    shutil.copy(source / "train" / "blue" / "001.png", source / bad[0])
    run("folder", source, out, skip_damaged=True)
    assert list(manifest.load(out).splits["train"].skipped) == bad[1:] and stored(out)[1] == [0, 0, 0, 1, 1]


def test_damaged_images_of_all_splits_are_named_at_once(tmp_path):
    source, out = simple_folder(tmp_path / "source"), tmp_path / "out"
    for name in ("train/blue/000.png", "test/red/001.png"):
        (source / name).write_bytes(b"no picture")
    message = refusal("folder", source, out)
    counts = [len(list((source / split).rglob("*.*"))) for split in ("train", "test")]
    numbers = [
        f"{split}: 1 of {n} images can not be converted" for split, n in zip(("train", "test"), counts, strict=True)
    ]
    assert message.startswith(f"{'; '.join(numbers)}: train/blue/000.png (can not be read") and not out.exists()
    assert "test/red/001.png (can not be read" in message and "--skip-damaged" in message
    record = run("folder", source, out, skip_damaged=True)
    assert [len(split.skipped) for split in record.splits.values()] == [1, 1]
    for path in (source / "train").rglob("*.*"):
        path.write_bytes(b"no picture")
    message = refusal("folder", source, tmp_path / "none", skip_damaged=True)
    assert message.startswith(f"train: {counts[0]} of {counts[0]}") and "; test: " not in message


def test_more_damaged_images_than_a_line_holds(tmp_path, capsys):
    source = simple_folder(tmp_path / "source", per_class=20, splits=("train",))
    bad = sorted((source / "train").rglob("*.png"))[1:]
    for path in bad:
        path.write_bytes(b"no picture")
    message = refusal("folder", source, tmp_path / "out")
    assert message.startswith("train: 39 of 40 images can not be converted, named above") and len(message) < 500
    assert str(bad[0]) in message and "--skip-damaged" in message
    *named, more = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in named] == list(map(str, bad[:20])) and more == "... and 19 more"
    assert run("folder", source, tmp_path / "out", skip_damaged=True).splits["train"].count == 1


def test_nothing_but_damaged_images_is_refused(tmp_path):
    source = simple_folder(tmp_path / "source", per_class=1, splits=("train",))
    for path in (source / "train").rglob("*.png"):
        path.write_bytes(b"")
    message = refusal("folder", source, tmp_path / "out", skip_damaged=True)
    assert "2 of 2 images" in message and "--root" in message and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ huge pictures


def huge(path, side):
    """A black picture of side x side pixels that takes little memory to make."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", (side, side)).save(path)


def test_a_picture_over_the_limit(tmp_path, recwarn):
    """The option that the message names reads it, without Pillow's warning, and Pillow's own limit is back after."""
    source = simple_folder(tmp_path / "source", per_class=1, splits=("train",))
    huge(source / "train" / "red" / "huge.png", 2000)
    before = Image.MAX_IMAGE_PIXELS
    message = refusal("folder", source, tmp_path / "out", max_pixels=3_999_998, max_side=100)
    assert "huge.png: has 4000000 pixels" in message and "--max-pixels 4000000" in message
    dataset = run("folder", source, tmp_path / "out", max_pixels=4_000_000, max_side=100)
    assert (dataset.splits["train"].count, dataset.splits["train"].max_height) == (3, 100)
    assert before == Image.MAX_IMAGE_PIXELS and not recwarn.list
    for value in (0, -1, 2**40):
        assert f"--max-pixels {value}" in refusal("folder", source, tmp_path / "out", max_pixels=value)


def test_the_remedy_reads_a_picture_that_was_left_out_before(tmp_path, capsys):
    source, out = simple_folder(tmp_path / "source", per_class=1, splits=("train",)), tmp_path / "out"
    huge(source / "train" / "red" / "huge.png", 2000)
    (source / "train" / "red" / "empty.png").touch()
    options = {"max_side": 100, "skip_damaged": True, "progress": True}
    record = run("folder", source, out, max_pixels=3_999_998, **options).splits["train"]
    assert "--max-pixels 4000000 reads it" in record.skipped["train/red/huge.png"] and record.count == 2
    inode = stored(out)[0]
    run("folder", source, out, max_pixels=3_999_998, **options)
    assert "train.beton: complete, kept" in capsys.readouterr().err and stored(out)[0] == inode
    record = run("folder", source, out, max_pixels=4_000_000, **options).splits["train"]
    assert "huge.png was left out of it and can be read now; converting it again" in capsys.readouterr().err
    assert list(record.skipped) == ["train/red/empty.png"] and record.count == 3


def test_what_readers_would_refuse_is_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_dist.convert.encode.MAX_STORED_PIXELS", 10_000)
    source = tmp_path / "source"
    save(source / "train" / "a" / "1.jpg", picture(200, 100))
    assert "200x100" not in (message := refusal("folder", source, tmp_path / "out"))
    assert "would be stored with 100x200 pixels" in message and "lower --max-side" in message
    assert run("folder", source, tmp_path / "out", max_side=100).splits["train"].max_height == 100


def test_a_format_that_pillow_knows_in_part(tmp_path):
    """Pillow raises NotImplementedError for a DDS file with unknown pixels, whatever the file is called."""
    source = simple_folder(tmp_path / "source", per_class=1, splits=("train",))
    path = save(source / "train" / "red" / "texture.dds", picture(9, 9))
    data = bytearray(path.read_bytes())
    data[80:84] = bytes(4)  # the flags of the pixels' format
    path.unlink()
    path.with_suffix(".png").write_bytes(data)
    message = refusal("folder", source, tmp_path / "out")
    assert "texture.png: can not be read as an image" in message and "pixel format" in message


def test_damage_of_every_kind_has_a_reason(tmp_path):
    """Bytes changed at random, of every format: an image is converted or named, and nothing else happens."""
    rng = np.random.default_rng(0)
    kinds = {"png": {}, "jpg": {}, "bmp": {}, "ppm": {}, "tif": {"compression": "tiff_lzw"}, "webp": {}}
    for suffix, options in kinds.items():
        for i in range(12):
            path = save(tmp_path / "source" / "train" / suffix / f"{i}.{suffix}", picture(9, 9, i), **options)
            data = bytearray(path.read_bytes())
            for _ in range(4):
                data[rng.integers(len(data))] = rng.integers(256)
            path.write_bytes(data[: rng.integers(1, len(data))] if i % 3 == 0 else data)
    save(tmp_path / "source" / "train" / "png" / "good.png", picture(9, 9))
    record = run("folder", tmp_path / "source", tmp_path / "out", skip_damaged=True).splits["train"]
    assert record.count + len(record.skipped) == 73 and len(record.skipped) > 20 and all(record.skipped.values())


def test_postscript_under_the_name_of_a_picture_is_not_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    source = simple_folder(tmp_path / "source", per_class=2)
    path = source / "train" / "red" / "000.png"
    Image.new("RGB", (40, 40)).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(path)
    message = refusal("folder", source, tmp_path / "out")
    assert f"{path}: can not be read as an image (PostScript, a program" in message
    assert run("folder", source, tmp_path / "out", skip_damaged=True).splits["train"].count == 3


def test_images_of_the_tests_in_training_and_images_in_two_classes_are_said_and_the_remedy_helps(tmp_path, capfd):
    source, out = simple_folder(tmp_path / "source", per_class=3), tmp_path / "out"
    for name in ("one.png", "two.png"):  # of the tests, one under another class
        shutil.copy(source / "test" / "red" / "000.png", source / "train" / "blue" / name)
    shutil.copy(source / "train" / "red" / "000.png", source / "train" / "blue" / "three.png")
    for split in ("train", "test"):  # nothing is said of what is left out
        for name in ("red", "blue"):
            (source / split / name / "empty.png").touch()
    run("folder", source, out, progress=True, skip_damaged=True)
    err = capfd.readouterr().err
    test, train = source / "test" / "red" / "000.png", source / "train" / "blue" / "three.png"
    count = Beton(out / "test.beton").count + 2
    assert f"test: 1 of its {count} images are in train, too, {test} for one; remove those there" in err
    assert f"train: 2 images stand in several classes, {train} for one; leave each in its own" in err
    for name in ("one.png", "two.png", "three.png"):
        (source / "train" / "blue" / name).unlink()
    shutil.rmtree(out)
    run("folder", source, out, progress=True, skip_damaged=True)
    err = capfd.readouterr().err
    assert "several classes" not in err and "too, " not in err
