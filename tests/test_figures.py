"""The figures of an evaluation: which images they show, and the metadata in their files."""

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from ssl_dist import cli, config
from ssl_dist.config import Data
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from ssl_dist.results import figures
from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features
from ssl_dist.train.loop import train


def part(digits, split, ids=None, name=None):
    """Features of a split of the digits, or of some images of it."""
    info = Dataset(digits).info(split)
    ids = np.arange(info.count) if ids is None else np.asarray(ids)
    metadata = {
        "dataset": "digits", "split": name or split, "data": info.sha256, "checkpoint": "c0ffee", "classes": "[]"
    }  # fmt: skip
    return Features(np.zeros((len(ids), 2), np.float32), ids % 10, ids, metadata, "the file")


@pytest.fixture
def opened(digits):
    """Opens a split, and remembers which readers it opened."""
    readers = []

    def open_split(split):
        readers.append(Dataset(digits, reader="arrays").open(split))
        return readers[-1]

    open_split.readers = readers
    return open_split


def data(**more):
    return Data(name="digits", root="x", **more)


def decoded(digits, split, ids):
    with Dataset(digits, reader="arrays").open(split) as reader:
        [(pixels, _, _, _)] = list(reader.batches([np.asarray(ids)]))
    return pixels


def test_the_images_asked_for_in_the_order_asked_for(digits, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_BLOCK_BYTES", 2 * 32 * 32 * 3)  # two images a block
    test, train = part(digits, "test"), part(digits, "train")
    rows = np.array([7, 3, 300, 3, 0])
    with FigureWriter(tmp_path, test, opened, data(), "knn") as writer:
        assert not opened.readers, "nothing is opened before an image is needed"
        assert np.array_equal(writer.images(test, rows), decoded(digits, "test", rows))
        assert np.array_equal(writer.images(train, rows), decoded(digits, "train", rows))
        assert np.array_equal(writer.images(test, rows[:1]), decoded(digits, "test", [7]))
        assert writer.images(test, rows[:0]).shape == (0, 32, 32, 3)
    assert [reader.info.split for reader in opened.readers] == ["test", "train"]
    for reader in opened.readers:
        with pytest.raises(ValueError, match="closed"):
            reader.labels(rows)


def test_a_piece_of_a_split_shows_the_images_of_its_ids(digits, opened, tmp_path):
    piece = part(digits, "train", [5, 9, 200], "train[held out 10%]")
    with FigureWriter(tmp_path, piece, opened, data(), "knn") as writer:
        assert np.array_equal(writer.images(piece, np.array([2, 0])), decoded(digits, "train", [200, 5]))
        path = writer.add("x", Figure(), "t", "c")
        test_path = writer.add("x", Figure(), "t", "c", part(digits, "test"))
    assert path.name == "digits-train-held-out-10-x.png" and test_path.name == "digits-test-x.png"


def test_the_images_are_those_of_the_test_transform(digits, opened, tmp_path):
    test = part(digits, "test")
    with FigureWriter(tmp_path, test, opened, data(image_size=24, eval_resize=40), "knn") as writer:
        [shown] = writer.images(test, np.array([11]))
    image = Image.fromarray(decoded(digits, "test", [11])[0])
    assert np.array_equal(shown, np.asarray(center_crop(resize(image, 40, InterpolationMode.BILINEAR), 24)))


def test_a_picture_says_what_it_is(digits, opened, tmp_path):
    test = part(digits, "test")
    with FigureWriter(tmp_path / "new" / "figures", test, opened, data(), "retrieval") as writer:
        figure = Figure(figsize=(1, 1), dpi=50)
        path = writer.add("nearest", figure, "Nearest images", "Cosine ≥ 0 – κ")
    assert path == tmp_path / "new" / "figures" / "digits-test-nearest.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (50, 50)
        texts = {key: picture.text[key] for key in ("Title", "Description", "Evaluator", "Checkpoint")}
    assert texts == {
        "Title": "Nearest images", "Description": "Cosine ≥ 0 – κ", "Evaluator": "retrieval", "Checkpoint": "c0ffee"
    }  # fmt: skip


def test_a_picture_is_written_whole_or_not_at_all(digits, opened, tmp_path, monkeypatch):
    writer = FigureWriter(tmp_path, part(digits, "test"), opened, data(), "knn")
    path = writer.add("x", Figure(figsize=(1, 1)), "old", "")
    (tmp_path / ".digits-test-x.png.01234567.tmp").touch()  # of one that was killed

    def fails(self, file, metadata):
        file.write(b"half of a picture")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", fails)
        with pytest.raises(KeyboardInterrupt):
            writer.add("x", Figure(figsize=(1, 1)), "new", "")
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as picture:
        assert picture.text["Title"] == "old"


def test_what_is_refused(digits, opened, tmp_path):
    test = part(digits, "test")
    other = Features(test.features, test.labels, test.image_ids, test.metadata | {"data": "other"}, "RUN/f.safetensors")
    with FigureWriter(tmp_path, test, opened, data(), "knn") as writer, pytest.raises(UserError) as caught:
        writer.images(other, np.array([0]))
    assert "RUN/f.safetensors: features of other images than the split test of digits" in str(caught.value)
    assert json.dumps(str(caught.value)).count("\\n") == 0
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        FigureWriter(tmp_path / "file" / "figures", test, opened, data(), "knn").add("x", Figure(), "", "")


def test_pictures_are_known_by_their_evaluator_and_checkpoint(digits, opened, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    assert not figures.has_pictures(tmp_path / "nowhere", "knn", "c0ffee")
    assert not figures.has_pictures(tmp_path, "knn", "c0ffee")
    FigureWriter(tmp_path, part(digits, "test"), opened, data(), "knn").add("x", Figure(figsize=(1, 1)), "t", "c")
    assert figures.has_pictures(tmp_path, "knn", "c0ffee")
    assert not figures.has_pictures(tmp_path, "knn", "another")
    assert not figures.has_pictures(tmp_path, "logistic", "c0ffee")


@pytest.mark.slow
def test_evaluate_leaves_the_pictures_and_their_metadata(digits, tmp_path, capsys):
    run = tmp_path / "run"
    settings = [f"data.root={digits}", f"run_dir={run}", "data.reader=arrays"]
    assert train(config.load("configs/digits/random_weights-conv4.yaml", settings)) == 0
    names = ["knn", "logistic", "retrieval", "clusters", "embedding"]
    quick = ["embedding.limit=120", "embedding.iterations=500", "clusters.starts=1"]
    assert cli.main(["evaluate", str(run), *names, *quick]) == 0
    checkpoint = {record["checkpoint"] for record in json.loads((run / "results.json").read_text())}
    pictures = sorted((run / "figures").glob("*.png"))
    lists = sorted((run / "figures").glob("*.csv"))
    assert [path.stem.removeprefix("digits-test-") for path in lists] == [
        "clusters", "knn-errors", "logistic-errors", "retrieval-errors", "retrieval-nearest",
    ]  # fmt: skip
    [page] = set((run / "figures").iterdir()) - {*pictures, *lists}
    assert page.name == "digits-test-clusters.html" and page.read_text().count("<article") == 10
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            texts = dict(picture.text)
        assert texts["Evaluator"] == path.stem.split("-")[2] and {texts["Checkpoint"]} == checkpoint
        assert texts["Title"] and "digits test" in texts["Description"]
    assert [path.stem.removeprefix("digits-test-") for path in pictures] == [
        "clusters-images", "clusters-purity", "embedding-images", "embedding-pca", "embedding-tsne",
        "knn-classes", "knn-confusion", "logistic-classes", "logistic-confusion",
        "retrieval-classes", "retrieval-confusion", "retrieval-nearest",
    ]  # fmt: skip
    assert (run / "tensorboard" / "embedding" / "projector_config.pbtxt").exists()
    shown = capsys.readouterr().out
    assert "retrieval_map" in shown and "clusters_hungarian_top1" in shown and "embedding_tsne_trust" in shown

    assert cli.main(["evaluate", str(run), *names, *quick]) == 0
    assert capsys.readouterr().err.count("already") == len(names)
    pictures[5].unlink()
    pictures[6].unlink()
    assert cli.main(["evaluate", str(run), *names, *quick]) == 0
    stderr = capsys.readouterr().err
    assert stderr.count("already") == len(names) - 1 and "knn: has no pictures of this checkpoint" in stderr
    assert sorted((run / "figures").iterdir()) == sorted([*pictures, *lists, page])
