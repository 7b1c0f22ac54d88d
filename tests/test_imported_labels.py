"""`ssl-dist labels --images`: labels of SeLa's authors, by order and by file name."""

import re
import shutil

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from ssl_dist import cli
from ssl_dist.convert.command import convert
from ssl_dist.data import labels
from tests.make_images import simple_folder

HEADS, IMAGES = 3, 12
L = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (HEADS, IMAGES)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An image folder, and what was converted from it."""
    place = tmp_path_factory.mktemp("labels")
    simple_folder(place / "images")
    convert("folder", place / "images", place / "data", workers=1, progress=False)
    return place / "images", place / "data"


@pytest.fixture
def imported(folders, tmp_path, capsys):
    """Runs the command on a file; returns what it wrote, int64 [heads, images], or its one line of error."""

    def run(file, images=folders[0], data=folders[1], *more):
        out = tmp_path / "out" / "labels.csv"
        words = ["labels", str(file), "--images", str(images), "--out", str(out), f"data.root={data}", *more]
        code = cli.main(words)
        output = capsys.readouterr()
        if code:
            assert code == 2 and not out.exists()
            return output.err.splitlines()[-1]
        heads = len(out.read_text().splitlines()[0].split(",")) - 1
        return np.stack([labels.read(out, column, IMAGES) for column in range(heads)]), output.out

    return run


FORMS = {
    "main.py": {"epoch": 401, "arch": "alexnet", "state_dict": {"a": torch.zeros(1)}, "optimizer": {}, "L": L},
    "cifar.py": {"net": {"a": torch.zeros(1)}, "acc": 0.5, "epoch": 3, "opt": {}, "L": L},
    "of August 2020": {"state_dict": {"a": torch.zeros(1)}, "labels": L.int()},
    "the labels alone": L,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_is_in_the_order_of_imagefolder(form, imported, folders, tmp_path):
    torch.save(FORMS[form], tmp_path / "file.pth")
    read, output = imported(tmp_path / "file.pth")
    assert np.array_equal(read, L.numpy())
    assert f"labels of {IMAGES} of {IMAGES} images by {HEADS} head(s)" in output
    assert "normalised mutual information with the 2 classes: 0." in output
    # that our ids are ImageFolder's places: its classes as labels agree with ours
    torch.save({"L": torch.tensor([ImageFolder(folders[0] / "train").targets])}, tmp_path / "true.pth")
    assert imported(tmp_path / "true.pth")[1].rstrip().endswith("the 2 classes: 1.000")


def test_one_head_may_be_a_row(imported, tmp_path):
    torch.save({"labels": L[0]}, tmp_path / "file.pth")
    assert np.array_equal(imported(tmp_path / "file.pth")[0], L[:1].numpy())


def lists(names):
    """The labels as lists by file name, in an order of their own."""
    order = np.random.default_rng(1).permutation(IMAGES)
    lines = [[names[i], *map(str, L[:, i].tolist())] for i in order]
    return {
        "names and labels": lines,
        "the name last": [[*line[1:], line[0]] for line in lines],
        "a head line": [["file", "0", "1", "2"], *lines],
        "pandas": [["", "file", "0", "1", "2"], *([str(n), *line] for n, line in enumerate(lines))],
        "without extension": [[line[0].removesuffix(".png"), *line[1:]] for line in lines],
    }


@pytest.mark.parametrize("form", lists([""] * IMAGES))
def test_a_list_is_matched_by_name(form, imported, folders, tmp_path):
    names = [path.removeprefix(f"{folders[0]}/") for path, _ in ImageFolder(folders[0] / "train").samples]
    text = "\n".join(",".join(line) for line in lists(names)[form])
    (tmp_path / "list.csv").write_text(text)
    assert np.array_equal(imported(tmp_path / "list.csv")[0], L.numpy())
    lines = text.splitlines()
    (tmp_path / "some.csv").write_text("\n".join([*lines[:-3], ""]))  # of some images
    read, output = imported(tmp_path / "some.csv")
    assert (read >= 0).all(0).sum() == 9 and f"labels of 9 of {IMAGES} images" in output
    assert np.array_equal(read[read >= 0], L.numpy()[read >= 0])


def test_images_that_were_left_out_have_no_row(imported, folders, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folders[0], images)
    damaged = sorted((images / "train").rglob("*.png"))[4]
    damaged.write_bytes(b"no picture")
    convert("folder", images, tmp_path / "data", workers=1, progress=False, skip_damaged=True)
    torch.save({"L": L}, tmp_path / "file.pth")
    read, output = imported(tmp_path / "file.pth", images, tmp_path / "data")
    assert np.array_equal(read[:, :11], np.delete(L.numpy(), 4, axis=1)) and (read[:, 11] == -1).all()
    assert "labels of 11 of 11 images" in output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {}}, "holds no labels, which are called L or labels; it holds state_dict"),
        ({"L": [1, 2]}, "no tensor but a list"),
        ({"L": torch.zeros(2, IMAGES)}, "torch.float32"),
        ({"L": L[:, 1:]}, r"\[3, 11\].*of the 12 images"),
        ({"L": L - 9}, "must be 0..999999"),
        ({"L": torch.nn.Linear(1, 1)}, "could run code"),
        ("blue/000.png,1\nblue/nothing.png,1", "line 2: .*no image has this name"),
        ("blue/0o0.png,1\nblue/001.png,1", "line 1: 'blue/0o0.png': no image has this name"),
        ("blue/0o0,1\nblue/001,1", "line 1: 'blue/0o0': no image has this name"),
        ("1,0o0.PNG\n1,blue/001.png", "line 1: '0o0.PNG': no image has this name"),
        ("\nn,file\n1,0o0.png\n2,blue/001.png", "line 3: '0o0.png': no image has this name"),
        ("blue/000.png,1\n001.png,1", "line 2: .*images have this name, give its folder"),
        ("blue/000.png,1\nblue/000.png,1", "line 2: its image stands on line 1"),
        ("blue/000.png,1\nblue/001.png,1,2", "line 2: has 2 label.*have 1"),
        ("blue/000.png,1\n3,1", "line 2: must have one file name"),
        ("blue/000.png,1234567", "whole numbers 0..999999"),
        ("file,a,b\nblue/000.png,1", "has 2 columns, the first line names 3"),
        ("file,a", "lists no image"),
    ],
)
def test_what_is_refused(content, words, imported, tmp_path):
    file = tmp_path / ("list.csv" if isinstance(content, str) else "file.pth")
    if isinstance(content, str):
        file.write_text(content)
    else:
        torch.save(content, file)
    line = imported(file)
    assert re.search(words, line), line


def test_images_of_another_conversion_and_keys_are_refused(imported, folders, tmp_path):
    torch.save({"L": L}, tmp_path / "file.pth")
    other = simple_folder(tmp_path / "other", per_class=5)
    assert "lists other images than those that" in imported(tmp_path / "file.pth", other)
    assert "override 'data.limit=3'" in imported(tmp_path / "file.pth", *folders, "data.limit=3")
    assert "data.split = val" in imported(tmp_path / "file.pth", *folders, "data.split=val").replace("'", "")
