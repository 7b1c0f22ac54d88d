"""tools/list_ids.py: names of images to the ids that a converted set gives them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ssl_dist.convert.command import convert
from ssl_dist.convert.listed import Places
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from tests.make_images import simple_folder

SPEC = importlib.util.spec_from_file_location("list_ids", Path(__file__).parents[1] / "tools" / "list_ids.py")
list_ids = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(list_ids)


@pytest.fixture
def root(tmp_path):
    simple_folder(tmp_path / "images")
    return tmp_path / "images"


def test_an_id_is_the_place_in_the_converted_file(root, tmp_path):
    files = sorted((root / "train").rglob("*.*"), key=lambda path: path.as_posix())
    chosen = [files[i] for i in (3, 0, 7)]
    lines = [f"{chosen[0].parent.name}/{chosen[0].name}", chosen[1].relative_to(root).as_posix(), ""]
    lines.append(f"{chosen[2].parent.name}/{chosen[2].stem}")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert list_ids.ids_of(tmp_path / "list.txt", root, "train") == [0, 3, 7]
    convert("folder", root, tmp_path / "data", workers=1, progress=False)
    with Dataset(tmp_path / "data", reader="arrays").open("train") as reader:
        labels = reader.labels(np.array([0, 3, 7]))
    classes = sorted({path.parent.name for path in files})
    assert [classes[label] for label in labels] == [files[i].parent.name for i in (0, 3, 7)]


def test_what_stands_behind_the_last_dot_may_belong_to_the_name():
    names = ["train/x/a.jpg", "train/x/a.b.jpg", "train/x/c.d.jpg", "train/x/e.jpg", "train/x/e.png", "train/y/c.d.jpg"]
    places = Places(names)
    for name, place in (("a", 0), ("a.jpg", 0), ("a.JPEG", 0), ("a.b.jpg", 1), ("x/a.b.png", 1), ("x/c.d", 2)):
        assert places.of(name, "here") == place
    for name in ("x/a.b", "c.d", "e"):  # a with the extension b, or a.b without one
        with pytest.raises(UserError, match=f"here: '{name}': 2 images have this name, give its folder and extension"):
            places.of(name, "here")
    for name, place in (("x/a.b.jpg", 1), ("y/c.d.jpg", 5), ("e.png", 4)):  # the remedy
        assert places.of(name, "here") == place


def test_names_that_are_none_or_two(root, tmp_path):
    name = next((root / "train").rglob("*.*")).name
    for line, message in (("nothing.JPEG", "no image has this name"), (name, "images have this name, give its folder")):
        (tmp_path / "list.txt").write_text(f"\n{line}\n")
        with pytest.raises(UserError, match=f"line 2: '{line}': .*{message}"):
            list_ids.ids_of(tmp_path / "list.txt", root, "train")
    with pytest.raises(UserError, match="--split val: "):
        list_ids.ids_of(tmp_path / "list.txt", root, "val")
