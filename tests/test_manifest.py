"""dataset.json: what is read of it, what is refused, and a channel that is constant."""

import json

import numpy as np
import pytest

from ssl_dist import config
from ssl_dist.data import manifest
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.run.blueprint import derive
from tests.conversions import run
from tests.make_images import picture, save


@pytest.fixture
def constant(tmp_path):
    """Pictures of two stains, kept as RGB: the blue channel is 0 everywhere."""
    for split in ("train", "test"):
        for number in range(8):
            pixels = picture(32, 32, number).copy()
            pixels[..., 2] = 0
            save(tmp_path / "source" / split / "ab"[number % 2] / f"{number}.png", pixels)
    return tmp_path / "source", tmp_path / "out"


def trained_on(root):
    own = [f"data.root={root}", "data.name=source", "data.reader=arrays", f"run_dir={root}/run", "optim.batch_size=4"]
    return derive(config.load("configs/digits/relational-conv4.yaml", own), RankInfo())


def test_a_constant_channel_has_a_standard_deviation_of_1(constant, capsys):
    source, out = constant
    stored = run("folder", source, out, progress=True)
    assert stored.mean[2] == 0 and stored.std[2] == 1 and min(stored.std[:2]) > 0 and max(stored.std[:2]) <= 0.5
    assert "constant in all images: blue; std is 1" in capsys.readouterr().err
    assert trained_on(out).normalize.std == stored.std


def test_a_standard_deviation_of_0_that_was_written_before(constant):
    source, out = constant
    std = run("folder", source, out).std
    tree = json.loads((out / "dataset.json").read_text()) | {"std": [*std[:2], 0.0]}
    (out / "dataset.json").write_text(json.dumps(tree))
    assert trained_on(out).normalize.std == std
    assert run("folder", source, out).std == std == manifest.load(out).std


def test_black_images(tmp_path):
    for split in ("train", "test"):
        for number in range(4):
            save(tmp_path / "source" / split / "ab"[number % 2] / f"{number}.png", np.zeros((32, 32, 3), np.uint8))
    assert run("folder", tmp_path / "source", tmp_path / "out").std == (1, 1, 1)
    assert trained_on(tmp_path / "out").normalize.std == (1, 1, 1)


def test_a_split_of_before_gets_the_checksum_of_its_tables_when_it_is_verified(constant):
    source, out = constant
    whole = run("folder", source, out)
    tree = json.loads((out / "dataset.json").read_text())
    for record in tree["splits"].values():
        del record["tables"]
    (out / "dataset.json").write_text(json.dumps(tree))
    assert Dataset(out, reader="arrays").info("train").count == 8
    before = (out / "train.beton").stat().st_ino
    assert run("folder", source, out) == whole == manifest.load(out)
    assert (out / "train.beton").stat().st_ino == before, "kept"


def test_a_byte_order_mark_is_passed_over(digits, tmp_path):
    text = (digits / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text("\ufeff" + text)
    assert manifest.load(tmp_path) == manifest.load(digits)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", [0.5]), ("mean", [0.5] * 4), ("mean", [NAN, 0.5, 0.5]), ("mean", [0.5, -0.1, 0.5]), ("mean", None),
        ("mean", [128.0, 128.0, 128.0]), ("mean", [10**400, 0, 0]), ("mean", {"red": 0}), ("mean", "0.5"),
        ("std", [0.2, 0.2]), ("std", [0.2, -0.2, 0.2]), ("std", [0.2, NAN, 0.2]), ("std", [INF, 0.2, 0.2]),
        ("std", [70.0, 70.0, 70.0]), ("std", [True, 0.2, 0.2]), ("classes", []), ("classes", ["0"]),
        ("classes", [0] * 10), ("splits", {}), ("splits", []),
        ("splits", {"../train": {}}),
        ("splits", {"a\0b": {}}), ("name", 3), ("format", 2), ("encoding", {"raw_side": 1}),
        ("splits.train.count", 0), ("splits.train.count", -1), ("splits.train.count", 10**30),
        ("splits.train.class_counts", [1]), ("splits.train.class_counts", [-1] * 10), ("splits.train.max_height", 0),
        ("splits.train.sha256", None), ("splits.train.tables", 3), ("splits.train.tables", "0" * 64),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_its_key_and_a_remedy(digits, tmp_path, key, value):
    tree = json.loads((digits / "dataset.json").read_text())
    *sections, last = key.split(".")
    section = tree
    for name in sections:
        section = section[name]
    section[last] = value
    (tmp_path / "dataset.json").write_text(json.dumps(tree))
    (tmp_path / "train.beton").symlink_to(digits / "train.beton")
    with pytest.raises(UserError) as caught:
        Dataset(tmp_path, reader="arrays").open("train")
    message = str(caught.value)
    assert "\n" not in message and "ssl-dist convert" in message, message
    assert key.split(".")[-1] in message, message


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"splits":' * 50_000, '{"splits": ' + "9" * 5000 + "}", "{", "[1]", "nul", '"splits"']
)
def test_what_is_no_dataset_json(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="ssl-dist convert") as caught:
        manifest.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_dataset_json_of_other_bytes(tmp_path):
    for content in (b"\xff\xfe{}", b"\0" * 100, b"\x80abc"):
        (tmp_path / "dataset.json").write_bytes(content)
        with pytest.raises(UserError, match="ssl-dist convert"):
            manifest.load(tmp_path)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").mkdir()
    with pytest.raises(UserError, match="directory"):
        manifest.load(tmp_path)
