"""What of a source is converted, and what is left out and said: links, hidden folders, odd files, names of splits."""

import os
import shutil

import pytest
import torchvision

from ssl_dist.convert.folders import image_folder
from tests.conversions import refusal, run
from tests.make_images import picture, save, simple_folder


@pytest.fixture
def source(tmp_path):
    return simple_folder(tmp_path / "source", per_class=2)


def rename(root, **names):
    for before, after in names.items():
        os.rename(root / before, root / after)


def listed(root):
    """Split -> (name, label) of every image."""
    return {
        split: list(zip(images.names, images.labels.tolist(), strict=True))
        for split, images in image_folder(root).splits.items()
    }


def said(root, *words):
    """Whether one line of what was left out holds all these words."""
    return any(all(word in line for word in words) for line in image_folder(root).left_out)


# ------------------------------------------------------------------------------------------------- names of splits


def test_split_names_in_any_case(source):
    before = listed(source)
    rename(source, train="Train", test="TEST")
    after = listed(source)
    assert list(after) == ["train", "test"] and image_folder(source).classes == ["blue", "red"]
    assert [label for _, label in after["test"]] == [label for _, label in before["test"]]


@pytest.mark.parametrize(
    ("train", "test"),
    [("training", "testing"), ("Training", "Validation"), ("train_images", "test2017"), ("trian", "x")],
)
def test_a_near_miss_is_asked_about(source, tmp_path, train, test):
    """Both remedies help: the folders get the names of splits, or everything is a class below train/."""
    rename(source, train=train, test=test)
    message = refusal("folder", source, tmp_path / "out")
    assert f"{train}/ looks like the split train" in message and "rename" in message
    assert not (tmp_path / "out").exists()
    shutil.copytree(source, tmp_path / "classes" / "train")
    assert image_folder(tmp_path / "classes").classes == sorted([train, test])
    rename(source, **{train: "train"})
    assert list(image_folder(source).splits) == ["train"]


def test_a_class_may_begin_like_a_split(tmp_path):
    for name in ("trains", "valley", "testudo", "rest"):
        save(tmp_path / name / "1.png", picture(5, 5))
    assert image_folder(tmp_path).classes == ["rest", "testudo", "trains", "valley"]


def test_folders_beside_the_splits_are_named(source):
    shutil.copytree(source / "test", source / "valid")
    for name in ("a", "b", "c", "docs"):
        (source / name).mkdir()
    save(source / "1.png", picture(5, 5))
    assert list(image_folder(source).splits) == ["train", "test"]
    assert said(source, "folders beside the splits (5)", "valid/ (rename it to val", "a/, b/, c/, docs/")
    assert said(source, "images beside the splits (1)", "1.png")
    rename(source, valid="val")
    assert list(image_folder(source).splits) == ["train", "val", "test"]


def test_one_split_twice_is_refused(source, tmp_path):
    shutil.copytree(source / "train", source / "Train")
    assert "Train and train are both the split train" in refusal("folder", source, tmp_path / "out")


def test_without_train_a_near_miss_is_asked_about(source, tmp_path):
    rename(source, train="Training")
    assert "Training/ looks like the split train" in refusal("folder", source, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../red", "../../test", "../../test/red"])
def test_a_link_into_the_source_is_not_followed(source, target):
    before = listed(source)
    (source / "train" / "blue" / "link").symlink_to(target)
    (source / "train" / "blue" / "other").symlink_to("link")
    assert listed(source) == before
    assert said(source, "links to a folder that holds a split, or lies in one (2)", "train/blue/link")


def test_a_link_out_of_the_source_is_followed_once(source, tmp_path):
    """Also where links lead round in a circle outside, and to one folder by two names."""
    pool = tmp_path / "pool"
    save(pool / "deep" / "9.png", picture(5, 5))
    (pool / "circle").symlink_to(pool)
    (source / "train" / "red" / "a").symlink_to(pool)
    (source / "train" / "red" / "b").symlink_to(pool / "deep")
    assert [name for name, _ in listed(source)["train"]][4:] == ["train/red/b/9.png"]
    assert said(source, "folders that were read under another name (2)", "train/red/a/circle", "train/red/a/deep")


def test_a_source_of_links(source, tmp_path):
    """Splits and classes may be links, a split one to another split; so may every file be."""
    links = tmp_path / "links"
    (links / "train").mkdir(parents=True)
    for name in ("blue", "red"):
        (links / "train" / name).symlink_to(source / "train" / name)
    (links / "val").symlink_to("train")
    found = listed(links)
    assert [label for _, label in found["train"]] == [label for _, label in found["val"]] == [0, 0, 1, 1]
    assert torchvision.datasets.ImageFolder(links / "train").targets == [0, 0, 1, 1]


def test_links_that_lead_nowhere(source, tmp_path):
    (source / "train" / "red" / "lost").symlink_to(tmp_path / "nowhere")
    (source / "train" / "red" / "x").symlink_to("y")
    (source / "train" / "red" / "y").symlink_to("x")
    assert len(listed(source)["train"]) == 4
    assert said(source, "links to nothing (3)", "train/red/lost")
    (source / "train" / "red" / "lost.png").symlink_to(tmp_path / "nowhere")  # an image that was moved away
    assert "lost.png: can not be read (No such file" in refusal("folder", source, tmp_path / "out")


# ------------------------------------------------------------------------------------- what programs and people leave


def test_hidden_folders_and_files(source):
    before = listed(source)
    for name in (".ipynb_checkpoints", "@eaDir", ".cache", "__MACOSX"):
        shutil.copytree(source / "train" / "red", source / "train" / "red" / name)
        shutil.copytree(source / "train" / "red", source / "train" / name)
    (source / "train" / "red" / "._000.png").write_bytes(b"x")
    assert listed(source) == before
    assert said(source, "hidden files and folders, and those that systems make (9)", "train/")


def test_other_suffixes_are_counted(source, tmp_path, capsys):
    for name in ("a.gif", "b.GIF", "c.jfif", "notes", "red.csv"):
        (source / "train" / "red" / name).write_bytes(b"x")
    assert said(source, "2 .gif, 1 .jfif, 1 no suffix, 1 .csv: files of other suffixes than .jpg, ", "train/red/a.gif")
    assert len(listed(source)["train"]) == 4
    run("folder", source, tmp_path / "out", progress=True)
    assert f"--root {source}: ignored: 2 .gif, 1 .jfif, 1 no suffix, 1 .csv: files of other" in capsys.readouterr().err


def test_an_empty_class_says_what_lies_there(source, tmp_path):
    for name in ("a.gif", "b.gif"):
        save(source / "train" / "green" / name, picture(5, 5))
    message = refusal("folder", source, tmp_path / "out")
    assert f"{source / 'train' / 'green'}: holds no image" in message and "but 2 .gif; fill or remove" in message


def test_a_pipe_is_no_image(source):
    os.mkfifo(source / "train" / "red" / "pipe.png")
    assert len(listed(source)["train"]) == 4 and said(source, "neither files nor folders (1)", "train/red/pipe.png")


def test_a_folder_that_can_not_be_read(source, tmp_path, monkeypatch):
    """Root may read everything, so the refusal of the system is made here."""
    locked = source / "train" / "red" / "locked"
    locked.mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("ssl_dist.convert.walk.os.scandir", refuse)
    message = refusal("folder", source, tmp_path / "out")
    assert f"{locked}: cannot be read: Permission denied; make it readable or remove it" in message


def test_a_chain_of_folders_without_end(source):
    """As deep as paths can be: no limit of Python's stands in the way."""
    here = os.open(source / "train" / "red", os.O_RDONLY)
    for _ in range(1050):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert len(listed(source)["train"]) == 4
    os.system(f"rm -rf '{source}'")  # shutil.rmtree recurses


# --------------------------------------------------------------------------------------------------- names and places


def test_a_class_name_that_is_no_utf8(source, tmp_path):
    for split in ("train", "test"):
        os.rename(source / split / "red", os.fsencode(source / split) + b"/caf\xe9")
    message = refusal("folder", source, tmp_path / "out")
    assert r"caf\\xe9" in repr(message) and "rename its folder" in message
    assert not (tmp_path / "out").exists()


def test_a_file_name_that_is_no_utf8(source, tmp_path):
    os.rename(source / "train" / "red" / "000.png", os.fsencode(source / "train" / "red") + b"/caf\xe9.png")
    assert run("folder", source, tmp_path / "out").splits["train"].count == 4


def test_a_name_that_no_config_could_give(tmp_path):
    source = simple_folder(tmp_path / "my photos", per_class=2)
    assert run("folder", source, tmp_path / "own").name == "my_photos"
    for name in ("my photos", "-x", "a\n"):
        message = refusal("folder", source, tmp_path / "out", name=name)
        remedy = message.rpartition("--name ")[2]
        assert "data.name" in message and not (tmp_path / "out").exists()
        assert run("folder", source, tmp_path / f"out-{remedy}-{name!r}", name=remedy).name == remedy


@pytest.mark.parametrize("inside", [".", "converted", "train/red/converted"])
def test_out_in_the_source_is_refused(source, inside):
    before = listed(source)
    message = refusal("folder", source, source / inside)
    assert f"--out {source / inside}: lies in the source" in message and "outside" in message
    assert listed(source) == before and not (source / "converted").exists()


# ---------------------------------------------------------------------------------------------- names that look alike

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_a_class_that_another_system_wrote_in_another_form_is_the_same_class(source):
    before = listed(source)
    rename(source / "train", red=COMPOSED)
    rename(source / "test", red=DECOMPOSED)
    assert image_folder(source).classes == ["blue", COMPOSED]
    assert {k: [label for _, label in v] for k, v in listed(source).items()} == {
        k: [label for _, label in v] for k, v in before.items()
    }


def test_one_name_in_two_forms_in_a_split_is_refused_and_the_remedy_helps(source, tmp_path):
    rename(source / "train", red=COMPOSED, blue=DECOMPOSED)
    message = refusal("folder", source, tmp_path / "out")
    assert "'cafe\\u0301' and 'caf\\xe9' are one name in two forms; move the images of both into one folder" in message
    for path in (source / "train" / DECOMPOSED).iterdir():
        path.rename(source / "train" / COMPOSED / f"more-{path.name}")
    (source / "train" / DECOMPOSED).rmdir()
    rename(source / "test", red=COMPOSED)
    shutil.rmtree(source / "test" / "blue")
    assert image_folder(source).classes == [COMPOSED] and len(listed(source)["train"]) == 4


def test_classes_that_differ_in_capitals_or_blanks_alone_are_said(source, tmp_path, capfd):
    for split in ("train", "test"):
        shutil.copytree(source / split / "red", source / split / "Red")
        shutil.copytree(source / split / "blue", source / split / "blue ")
    run("folder", source, tmp_path / "out", progress=True)
    lines = capfd.readouterr().err.splitlines()
    for one, other in (("Red", "red"), ("blue", "blue ")):
        assert any(f"{one!r} and {other!r} are two classes; where they are one" in line for line in lines)
