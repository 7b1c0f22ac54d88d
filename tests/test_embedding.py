"""Maps of features: scikit-learn's numbers, a map that can be made again, and files that TensorBoard can load."""

import itertools
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from threadpoolctl import threadpool_limits

from ssl_dist.errors import UserError
from ssl_dist.evaluators import embedding
from ssl_dist.keys import EVALUATION, hash64
from ssl_dist.results.sampling import evenly
from ssl_dist.storage.features import Features
from tests.figure_writer import MemoryFigureWriter, drawn
from tests.full_disk import FullDisk
from tests.messages import naming

QUICK = {"iterations": 500, "perplexity": 8.0}


def part(count, split="test", dim=12, num_classes=3, spread=1.0):
    """Classes around directions, in a space of which half the directions are nearly empty."""
    generator = np.random.default_rng([count, split == "test"])
    labels = np.arange(count) % num_classes
    features = 4 * np.eye(dim)[labels] + spread * generator.standard_normal((count, dim)) * np.linspace(1, 0.1, dim)
    metadata = {"classes": json.dumps(["a\tdisc", "ring", "star"]), "split": split, "dataset": "shapes", "step": "120"}
    return Features(features.astype(np.float32), labels, np.arange(count), metadata, "the file")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(test split, options, values, writer) of a run with pictures."""
    test, options = part(151), embedding.Options(limit=100, **QUICK)
    run = tmp_path_factory.mktemp("run")
    writer = MemoryFigureWriter(run / "figures")
    return test, options, embedding.run(part(60, "train"), test, options, writer), writer


def test_values_are_scikit_learns(embedded):
    test, _, values, writer = embedded
    rows = evenly(test.labels, 100, hash64(0, EVALUATION))
    assert np.bincount(test.labels[rows]).tolist() in ([34, 33, 33], [33, 34, 33], [33, 33, 34])
    x = unit(test.features[rows].astype(np.float64))
    share = PCA().fit(x).explained_variance_ratio_ * 100
    assert values["embedding_pca2_variance"] == pytest.approx(share[:2].sum())
    assert values["embedding_pca10_variance"] == pytest.approx(share[:10].sum())
    dims = int(values["embedding_pca90_dims"])
    assert share[:dims].sum() >= 90 > share[: dims - 1].sum()
    assert values["embedding_pca_trustworthiness"] == pytest.approx(trustworthiness(x, PCA(2).fit_transform(x)))
    points = map_of(writer, "embedding-tsne")
    order = np.argsort(test.labels[rows], kind="stable")  # the picture draws class by class
    assert values["embedding_tsne_trustworthiness"] == pytest.approx(trustworthiness(x[order], points))
    assert 0.8 < values["embedding_tsne_trustworthiness"] <= 1


def map_of(writer, name):
    return np.concatenate([np.asarray(c.get_offsets()) for c in writer.pictures[name][0].axes[0].collections])


def test_it_can_be_made_again_whatever_the_threads(embedded):
    test, options, values, writer = embedded
    again = MemoryFigureWriter(writer.folder)
    with threadpool_limits(2):
        assert embedding.run(part(60, "train"), test, options, again) == values
    assert np.array_equal(map_of(again, "embedding-tsne"), map_of(writer, "embedding-tsne"))
    assert embedding.run(part(60, "train"), test, options) == values, "pictures change nothing"
    other = embedding.run(part(60, "train"), test, embedding.Options(limit=100, seed=1, **QUICK))
    assert other["embedding_tsne_trustworthiness"] != values["embedding_tsne_trustworthiness"]


def test_the_pictures(embedded):
    test, _, values, writer = embedded
    assert list(writer.pictures) == ["embedding-pca", "embedding-tsne", "embedding-images"]
    for name, (figure, title, caption) in writer.pictures.items():
        drawn(figure)
        assert title and "100 images of shapes test, evenly over the classes by key (seed 0)" in caption
        assert {"ring", "star"} <= set(writer.texts(name))
    share = PCA().fit(unit(test.features[evenly(test.labels, 100, hash64(0, EVALUATION))])).explained_variance_ratio_
    assert f"first component ({share[0] * 100:.1f} % of the variance)" in writer.texts("embedding-pca")
    assert "perplexity 8, 500 iterations" in writer.pictures["embedding-tsne"][2]
    assert f"Trustworthiness {values['embedding_tsne_trustworthiness']:.3f}" in writer.pictures["embedding-tsne"][2]


def test_the_projector_gets_vectors_labels_and_thumbnails(embedded):
    test, _, _, writer = embedded
    folder = writer.folder.parent / "tensorboard" / "embedding"
    rows = evenly(test.labels, 100, hash64(0, EVALUATION))
    config = (folder / "projector_config.pbtxt").read_text()
    paths = dict(re.findall(r'(\w+_path): "(.+)"', config))
    assert set(paths) == {"tensor_path", "metadata_path", "image_path"}
    vectors = np.loadtxt(folder / paths["tensor_path"])
    x = unit(test.features[rows].astype(np.float64))
    assert vectors.shape == (100, 12)
    distances = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    np.testing.assert_allclose(distances, np.linalg.norm(x[:, None] - x, axis=2), atol=1e-5)
    lines = (folder / paths["metadata_path"]).read_text().splitlines()
    assert lines[0] == "class\timage\tfile"
    assert lines[1:] == [f"{['a disc', 'ring', 'star'][test.labels[i]]}\t{i}\ttest/{i}.jpg" for i in rows]
    with Image.open(folder / paths["image_path"]) as sprite:
        assert sprite.size == (80, 80)
        for place in (0, 11, 99):
            red, green, blue = sprite.getpixel((8 * (place % 10) + 4, 8 * (place // 10) + 4))
            assert red >= 199 and abs(green * 256 + blue - rows[place]) <= 1
    before = sorted(path.name for path in folder.iterdir())
    columns = {"image": list(map(str, rows)), "file": [""] * 100}
    embedding.write_projector(folder, vectors, torch.zeros(100, 3, 8, 8), test, columns)
    (written,) = folder.rglob("metadata.tsv")
    assert written.read_text().split() == columns["image"], "of one column TensorBoard wants no header"
    assert len(sorted(folder.iterdir())) == len(before), "another one takes its place"
    assert [path.name for path in folder.parent.iterdir()] == ["embedding"]


@pytest.mark.parametrize("label", [-1, 2])
def test_of_a_split_alone_without_classes(label, tmp_path):
    """The maps of the same images are those that labels would have given: nothing looks at them but the colours."""
    labelled, options = part(60), embedding.Options(limit=60, **QUICK)
    alone, writer = replace(labelled, labels=np.full(60, label)), MemoryFigureWriter(tmp_path / "figures")
    assert embedding.run(alone, alone, options, writer) == embedding.run(part(9, "train"), labelled, options)
    for name, (figure, _, caption) in writer.pictures.items():
        drawn(figure)
        assert "60 images of shapes test, which has no classes, drawn by key" in caption and "class." not in caption
        assert not {"ring", "star"} & set(writer.texts(name))
    (written,) = tmp_path.rglob("metadata.tsv")
    assert written.read_text().splitlines()[:2] == ["image\tfile", "0\ttest/0.jpg"]
    with pytest.raises(UserError, match=r"no label|at least two classes"):
        embedding.run(alone, part(60), options)


def test_no_space_for_the_projector(tmp_path, capfd):
    """One error, and the files of before stay. Nothing of TensorBoard's is printed."""
    test, folder = part(4), tmp_path / "embedding"
    arguments = folder, test.take(np.arange(4))[:, :3], torch.zeros(4, 3, 8, 8), test, {"image": list("0123")}
    embedding.write_projector(*arguments)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for allowed in itertools.count():
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = FullDisk(monkeypatch, tmp_path, allowed)
            try:
                embedding.write_projector(*arguments)
            except UserError as error:
                assert str(folder) in str(error) and "No space left" in str(error)
        if disk.changes <= allowed:
            break
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert list(tmp_path.iterdir()) == [folder]
    assert allowed > 5 and capfd.readouterr() == ("", "")


def test_large_images_become_thumbnails(embedded):
    test, *_ = embedded
    writer = MemoryFigureWriter()
    writer.images = lambda part, rows: np.full((len(rows), 100, 100, 3), 250, np.uint8)
    thumbnails = embedding._thumbnails(writer, test, np.arange(151).repeat(2))
    assert thumbnails.shape == (302, 3, 40, 40) and thumbnails.min() > 0.97 and thumbnails.max() <= 1


def test_features_of_one_dimension():
    one = part(60, dim=3)
    narrow = Features(one.features[:, :1], one.labels, one.image_ids, one.metadata)
    with pytest.raises(UserError, match="at least two features"):
        embedding.run(narrow, narrow, embedding.Options(**QUICK))


@pytest.mark.parametrize("count", [4, 5, 9, 20])
def test_few_images_are_told_options_that_work(count):
    with pytest.raises(UserError, match=naming("embedding.perplexity = 30", count, "give embedding")) as caught:
        embedding.run(part(count), part(count), embedding.Options(iterations=500))
    given = re.findall(r"embedding\.(\w+)=(\d+)", str(caught.value))
    options = embedding.Options(iterations=500, **{name: int(value) for name, value in given})
    assert len(embedding.run(part(count), part(count), options)) == 5
    with pytest.raises(UserError, match="3 images are too few"):
        embedding.run(part(3), part(3), options)


def test_what_is_refused():
    train, test = part(30, "train"), part(20)
    with pytest.raises(UserError, match=naming("embedding.perplexity = 30", 20)):
        embedding.run(train, test, embedding.Options())
    with pytest.raises(UserError, match=naming("embedding.neighbours = 10", 20)):
        embedding.run(train, test, embedding.Options(neighbours=10, perplexity=5))
    for rows in (np.ones((20, 3)), np.random.default_rng(0).normal(size=(20, 3)) * 1e-30):  # t-SNE crashes on these
        same = Features(rows.astype(np.float32), test.labels, test.image_ids, test.metadata, "the file")
        for normalize in (True, False):
            with pytest.raises(UserError, match=naming("the file", "same features", "collapsed")):
                embedding.run(same, same, embedding.Options(perplexity=5, normalize=normalize))


@pytest.mark.slow
def test_tensorboard_serves_the_projector(embedded):
    _, _, _, writer = embedded
    logs = writer.folder.parent / "tensorboard"
    program = Path(sys.executable).with_name("tensorboard")
    with open(logs.parent / "tensorboard.log", "w+") as log:
        process = subprocess.Popen(
            [program, "--logdir", logs, "--port", "0", "--host", "localhost", "--load_fast=false"],
            stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin", "HOME": str(logs.parent)},
        )  # fmt: skip
        try:
            base = _address(process, Path(log.name)) + "data/plugin/projector/"
            assert _eventually(base + "runs", lambda text: json.loads(text) == ["embedding"])
            info = json.loads(_get(base + "info?run=embedding"))["embeddings"]
            assert [entry["tensorName"] for entry in info] == ["shapes-test:00120"]
            query = "?run=embedding&name=shapes-test:00120"
            tensor = np.frombuffer(_get(base + "tensor" + query), np.float32)
            assert tensor.shape == (100 * 12,)
            assert _get(base + "metadata" + query).decode().startswith("class\timage\tfile\n")
            assert _get(base + "sprite_image" + query).startswith(b"\x89PNG")
            assert info[0]["sprite"]["singleImageDim"] == [8, 8]
        finally:
            process.terminate()
            process.wait(20)


def _address(process, log, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if match := re.search(r"http://localhost:\d+/", log.read_text()):
            return match[0]
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def _get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


def _eventually(url, holds, seconds=60):
    """TensorBoard lists a run when it has found its folder."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if holds(_get(url)):
                return True
        except urllib.error.URLError:
            pass
        time.sleep(0.5)
    return False
