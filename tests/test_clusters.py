"""Clusters: scikit-learn's scores, accuracies by slow loops, k-means that finds what is there, and the pictures."""

import base64
import io
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics
from sklearn.cluster import KMeans

from ssl_dist import evaluators
from ssl_dist.data import labels as labels_file
from ssl_dist.errors import UserError
from ssl_dist.evaluators import clusters
from ssl_dist.keys import EVALUATION, ORDER, hash64, permutation
from ssl_dist.results.cluster_page import Cluster, colour, html
from ssl_dist.storage.features import Features
from tests.figure_writer import MemoryFigureWriter, drawn
from tests.messages import naming


def part(features, labels, split="train", names="abcde"):
    features, labels = np.asarray(features, np.float32), np.asarray(labels, np.int64)
    metadata = {"classes": json.dumps(list(names)), "split": split, "dataset": "shapes"}
    return Features(features, labels, np.arange(len(labels)), metadata, "the file")


def blobs(count, split, spread=0.3, num_classes=3, seed=0):
    """Classes around directions that lie apart."""
    generator = np.random.default_rng([seed, split == "test"])
    labels = np.arange(count) % num_classes
    return part(3 * np.eye(6)[labels] + spread * generator.standard_normal((count, 6)), labels, split)


labelings = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=12)


@settings(max_examples=25)
@given(labelings)
def test_scores(pairs):
    labels, assigned = np.array(pairs).T
    scores = clusters.scores(labels, assigned)
    assert scores["nmi"] == metrics.normalized_mutual_info_score(labels, assigned)
    assert scores["ami"] == metrics.adjusted_mutual_info_score(labels, assigned)
    assert scores["ari"] == metrics.adjusted_rand_score(labels, assigned)
    majority = sum(max(sum(y == c for y in labels[assigned == k]) for c in range(3)) for k in set(assigned.tolist()))
    assert scores["majority_top1"] == pytest.approx(majority * 100 / len(labels))
    # Every way to give each of four clusters a class of its own, or none (classes 3 to 6 that nobody has).
    ways = itertools.permutations(range(7), 4)
    best = max(sum(way[k] == y for k, y in zip(assigned, labels, strict=True)) for way in ways)
    assert scores["hungarian_top1"] == pytest.approx(best * 100 / len(labels))


@pytest.mark.parametrize("count", [30, 31, 101])
def test_classes_that_lie_apart_are_found(count):
    train, test = blobs(60, "train"), blobs(count, "test")
    values = clusters.run(train, test, clusters.Options())
    for split in ("", "train_"):
        assert values[f"clusters_{split}nmi"] == pytest.approx(1)
        assert values[f"clusters_{split}hungarian_top1"] == values[f"clusters_{split}majority_top1"] == 100
    assert len(values) == 10


@pytest.mark.parametrize("normalize", [True, False])
def test_k_means_is_as_good_as_scikit_learns_and_assigns_the_test_split_to_its_centres(normalize):
    train, test = blobs(200, "train", 1.5, 5), blobs(77, "test", 1.5, 5)
    options = clusters.Options(number=6, normalize=normalize, starts=10)
    centres = clusters._fitted(train, options.number, options).numpy()

    def rows(part):
        x = part.features.astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x

    distances = ((rows(test)[:, None] - centres) ** 2).sum(2)
    assigned = clusters._assigned(test, clusters._fitted(train, options.number, options), options)
    assert np.array_equal(assigned, distances.argmin(1))
    inertia = ((rows(train)[:, None] - centres) ** 2).sum(2).min(1).sum()
    theirs = KMeans(6, n_init=10, random_state=0, max_iter=100, tol=0).fit(rows(train))
    assert inertia == pytest.approx(theirs.inertia_, rel=0.02)
    values = clusters.run(train, test, options)
    assert values["clusters_ari"] == metrics.adjusted_rand_score(test.labels, assigned)


def test_seed_and_budget():
    train, test = blobs(300, "train", 2), blobs(77, "test", 2)
    one = clusters.run(train, test, clusters.Options(seed=1, starts=1))
    assert one == clusters.run(train, test, clusters.Options(seed=1, starts=1, memory_mb=1))
    assert one != clusters.run(train, test, clusters.Options(seed=2, starts=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "_rows_in", lambda *_: 7)
        assert one == clusters.run(train, test, clusters.Options(seed=1, starts=1))


def test_k_means_is_fitted_on_the_training_images_drawn_by_key():
    train, test = blobs(300, "train", 2), blobs(77, "test", 2)
    # The centre of one cluster is the mean of the images that it is fitted on.
    seed0, seed3, all_of_them = (
        clusters._fitted(train, 1, clusters.Options(limit=limit, seed=seed, normalize=False)).numpy()[0]
        for limit, seed in ((50, 0), (50, 3), (300, 3))
    )
    np.testing.assert_allclose(all_of_them, train.features.astype(float).mean(0))
    rows = permutation(hash64(3, EVALUATION, ORDER), 300)[:50]
    np.testing.assert_allclose(seed3, train.features[rows].astype(float).mean(0))
    assert not np.allclose(seed0, seed3)
    whole = clusters.run(train, test, clusters.Options(limit=300))
    assert whole == clusters.run(train, test, clusters.Options(limit=1000))


def test_fewer_different_images_than_clusters():
    train = part(np.repeat(np.eye(3), 10, axis=0), np.arange(30) % 4)
    assert len(clusters._fitted(train, 4, clusters.Options())) == 3
    assert clusters.run(train, train, clusters.Options())["clusters_majority_top1"] < 50


def test_of_a_split_alone_with_classes():
    """k-means on its own images, measured on them: the numbers of a training split."""
    train = blobs(60, "train", 1.5)
    alone, both = (clusters.run(train, test, clusters.Options()) for test in (train, blobs(9, "test")))
    assert {
        name.replace("clusters_", "clusters_train_"): value for name, value in alone.items()
    }.items() <= both.items()
    assert len(alone) == 5


@pytest.mark.parametrize("label", [-1, 2])
def test_of_a_split_alone_without_classes(label, tmp_path):
    ids = np.array([i for i in range(66) if i < (30, 66, 45)[i % 3]])  # 10, 22 and 15 around three directions
    images = replace(blobs(66, "test", num_classes=3), labels=np.full(66, label)).subset(ids)
    writer, options = MemoryFigureWriter(), clusters.Options(number=3, page=2)
    values = clusters.run(images, images, options, writer)
    assert values == {"clusters_count": 3, "clusters_largest": pytest.approx(2200 / 47)}
    assigned = clusters._assigned(images, clusters._fitted(images, 3, options), options)
    number = [set(assigned[ids % 3 == direction]) for direction in (1, 2, 0)]
    assert all(len(numbers) == 1 for numbers in number)
    order = [numbers.pop() for numbers in number]
    assert writer.tables["clusters"] == [("image_id", "file", "cluster")] + [
        (i, f"test/{i}.jpg", k) for i, k in zip(ids.tolist(), assigned.tolist(), strict=True)
    ]
    assert list(writer.pictures) == ["clusters-images"]
    figure, _, caption = writer.pictures["clusters-images"]
    drawn(figure)
    assert "3 clusters (k-means with 3 clusters on these images), the largest first" in caption
    assert (
        "All clusters: figures/clusters.html. All images: figures/clusters.csv." in caption and "class" not in caption
    )
    assert not any(axes.spines["top"].get_visible() for axes in figure.axes)
    assert [text for text in writer.texts("clusters-images") if text.startswith("cluster ")] == [
        f"cluster {k}: {size} images" for k, size in zip(order, (22, 15, 10), strict=True)
    ]
    shown = re.findall(r'<img src="data:\S+" alt="test/(\d+).jpg" title="test/(\d+).jpg">', writer.pages["clusters"])
    assert [int(i) % 3 for i, _ in shown] == [1, 1, 2, 2, 0, 0]
    assert "the largest first" in writer.pages["clusters"] and "%<" not in writer.pages["clusters"]
    assert clusters.run(images, images, clusters.Options())["clusters_count"] == 10
    few = images.subset(np.arange(4))
    assert clusters.run(few, few, clusters.Options())["clusters_count"] == 4
    path = labels_of(tmp_path, np.arange(66), [np.arange(66) % 2])
    values = clusters.run(images, images, clusters.Options(labels=path))
    assert values == {
        "clusters_count": 2,
        "clusters_largest": pytest.approx(max((ids % 2 == k).mean() for k in (0, 1)) * 100),
    }
    with pytest.raises(UserError, match=r"no label|at least two classes"):
        clusters.run(images, blobs(12, "test"), clusters.Options())


def test_a_class_that_one_split_lacks():
    train, test = blobs(60, "train", num_classes=3), blobs(40, "test", num_classes=4)
    assert clusters.run(train, test, clusters.Options())["clusters_hungarian_top1"] == 75


def labels_of(tmp_path, ids, rows):
    path = tmp_path / "labels.csv"
    path.write_text(labels_file.text(np.asarray(ids), np.asarray(rows)))
    return str(path)


def test_labels_of_a_file_are_measured_on_the_images_that_it_lists(tmp_path):
    train, test = blobs(30, "train"), blobs(12, "test")
    ids = np.arange(1, 30)
    path = labels_of(tmp_path, ids, [ids % 2, (ids + 1) % 3])
    values = clusters.run(train, test, clusters.Options(labels=path, column=1))
    assert list(values) == [f"clusters_train_{n}" for n in ("nmi", "ami", "ari", "majority_top1", "hungarian_top1")]
    assert values["clusters_train_nmi"] == pytest.approx(1) and values["clusters_train_hungarian_top1"] == 100
    by_parity = clusters.run(train, test, clusters.Options(labels=path))
    expected = clusters.scores(train.labels[1:], ids % 2)
    assert by_parity == {f"clusters_train_{name}": value for name, value in expected.items()}

    module, options = evaluators.find("clusters"), clusters.Options(labels=path, column=1)
    protocol = evaluators.protocol(module, options)
    assert f"column 1 of {path} (" in protocol
    labels_of(tmp_path, ids, [ids % 2, ids % 3])
    assert evaluators.protocol(module, options) != protocol, "another file is another protocol"


def test_what_is_refused(tmp_path):
    train, test = blobs(30, "train"), blobs(12, "test")
    with pytest.raises(UserError, match=naming("clusters.number = 31", 30, "clusters.number", 30)):
        clusters.run(train, test, clusters.Options(number=31))
    with pytest.raises(UserError, match=naming("clusters.number = 3", 2)):
        clusters.run(train, test, clusters.Options(limit=2))
    wide = part(np.ones((1000, 500)), np.arange(1000) % 3)
    with pytest.raises(UserError, match=naming("memory_mb = 2", 1000, 500, "5 MiB", "limit = 50000")):
        clusters.run(wide, wide, clusters.Options(memory_mb=2))
    missing = clusters.Options(labels=str(tmp_path / "no.csv"))
    for call in (clusters.protocol, lambda options: clusters.run(train, test, options)):
        with pytest.raises(UserError, match=r"clusters\.labels = .*no\.csv.*cannot be read: No such file"):
            call(missing)
    path = labels_of(tmp_path, [0, 10**9], [[0, 1]])
    with pytest.raises(UserError, match=naming("clusters.labels", "line 3", 10**9)):
        clusters.run(train, test, clusters.Options(labels=path))
    path = labels_of(tmp_path, [28, 29, 30], [[0, 1, 0]])  # another split's; of a part, ids are the whole split's
    for images in (train, train.subset(np.array([3, 28, 29]))):
        with pytest.raises(UserError, match=naming("clusters.labels", "line 4", 30, "0..29", "labels of this split")):
            clusters.run(images, test, clusters.Options(labels=path))
    path = labels_of(tmp_path, [28, 29], [[0, 1]])
    assert clusters.run(train, test, clusters.Options(labels=path))
    with pytest.raises(UserError, match="lists no image of the file"):
        clusters.run(train.subset(np.arange(9)), test, clusters.Options(labels=path))
    path = labels_of(tmp_path, [0, 1], [[0, 1]])
    with pytest.raises(UserError, match=naming("clusters.column = 1", 1)):
        clusters.run(train, test, clusters.Options(labels=path, column=1))
    (tmp_path / "labels.csv").write_text("image_id,label_0\n")
    with pytest.raises(UserError, match="lists no image"):
        clusters.run(train, test, clusters.Options(labels=str(tmp_path / "labels.csv")))


def test_labels_of_the_whole_split_for_a_part_of_it(tmp_path):
    train, test = blobs(30, "train"), blobs(12, "test")
    path = labels_of(tmp_path, np.arange(30)[::-1], [np.arange(30)[::-1] % 3])
    few = np.array([2, 3, 4, 9])
    values = clusters.run(train.subset(few), test, clusters.Options(labels=path))
    assert values == {f"clusters_train_{n}": v for n, v in clusters.scores(train.labels[few], few % 3).items()}


def test_the_pictures():
    train, test = blobs(60, "train", 1.5), blobs(50, "test", 1.5)
    writer, options = MemoryFigureWriter(), clusters.Options(number=4)
    assert clusters.run(train, test, options, writer) == clusters.run(train, test, options)
    assert list(writer.pictures) == ["clusters-purity", "clusters-images"]
    for figure, title, caption in writer.pictures.values():
        drawn(figure)
        assert title and "50 images of shapes test in 4 clusters (k-means with 4 clusters" in caption
    assigned = clusters._assigned(test, clusters._fitted(train, options.number, options), options)
    counts = clusters.contingency(test.labels, assigned)
    purity = counts.max(1) / counts.sum(1)
    order = np.argsort(-purity, kind="stable")
    bars = writer.pictures["clusters-purity"][0].axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx((100 * purity[order]).tolist())
    texts = [text for text in writer.texts("clusters-images") if text.startswith("cluster ")]
    best = counts.argmax(1)
    assert texts == [
        f"cluster {k}: {counts[k].sum()} images\n{100 * purity[k]:.0f} % {'abcde'[best[k]]}" for k in order
    ]
    shown = iter(zip(writer.images_shown("clusters-images"), writer.pictures["clusters-images"][0].axes, strict=True))
    for k in order:
        own_before = True
        for (split, image), axes in itertools.islice(shown, min(14, int(counts[k].sum()))):
            own = test.labels[image] == best[k]
            assert split == "test" and assigned[image] == k and axes.spines["top"].get_visible() == own
            assert own_before or not own, "those of the cluster's class stand first"
            own_before = own


def test_pictures_of_the_labels_of_a_file_are_of_the_training_split(tmp_path):
    train, test = blobs(90, "train"), blobs(12, "test")
    path = labels_of(tmp_path, np.arange(90), [np.arange(90) * 7 % 45])  # 45 clusters: not all are shown
    writer = MemoryFigureWriter()
    clusters.run(train, test, clusters.Options(labels=path), writer)
    assert all(part is train for part in writer.part_of.values())
    assert {split for split, _ in writer.images_shown("clusters-images")} == {"train"}
    assert sum(text.startswith("cluster ") for text in writer.texts("clusters-images")) == 20
    assert "the 10 purest and the 10 least pure" in writer.pictures["clusters-images"][2]
    assert "... 5 clusters between ..." in writer.texts("clusters-purity")


def test_the_page_shows_all_clusters_in_two_orders(tmp_path):
    """45 clusters of 90 images in 5 classes: places, sizes, purities and frames by slow loops over the labels."""
    train, test = blobs(90, "train", num_classes=5), blobs(12, "test")
    assigned = np.random.default_rng(0).integers(0, 45, 90)
    assigned[assigned == 7] = 8  # one is empty
    path = labels_of(tmp_path, np.arange(90), [assigned])
    writer = MemoryFigureWriter()
    clusters.run(train, test, clusters.Options(labels=path, page=3, seed=5), writer)
    page = writer.pages["clusters"]
    assert writer.part_of["clusters"] is train
    present = sorted(set(assigned.tolist()))
    articles = re.findall(r"<article style=\"--p:(\d+);--r:(\d+)\"><p>cluster (\d+)<small>(.*?)</article>", page, re.S)
    assert sorted(int(number) for _, _, number, _ in articles) == present
    assert [int(place) for place, *_ in articles] == list(range(len(present)))
    assert sorted(int(place) for _, place, *_ in articles) == list(range(len(present)))
    assert [place for place, *_ in articles] != [place for _, place, *_ in articles]
    purities = []
    for _, _, number, text in articles:
        own = train.labels[assigned == int(number)].tolist()
        most = max(range(5), key=own.count)
        purities.append(own.count(most) / len(own))
        assert text.startswith(f"{len(own)} images, {100 * own.count(most) / len(own):.0f} %</small>")
        assert f'style="{colour(most)}"></i> {"abcde"[most]}<' in text
        shown = re.findall(
            r'<img src="data:image/jpeg;base64,(\S+)" alt="(.): train/\d+.jpg" title="(.): \S+" style="(.*?)">', text
        )
        assert len(shown) == min(3, len(own))
        counts = [own.count("abcde".index(name)) for _, name, _, _ in shown]
        assert counts == sorted(counts, reverse=True)
        for data, name, title, style in shown:
            assert name == title and style == colour("abcde".index(name)) and own.count("abcde".index(name))
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                assert picture.size == (8, 8)
    assert purities == sorted(purities, reverse=True)
    assert len({colour(label) for label in range(1000)}) > 500
    nothing = MemoryFigureWriter()
    clusters.run(train, test, clusters.Options(labels=path, page=0), nothing)
    assert not nothing.pages and nothing.pictures


def test_a_class_cannot_write_markup():
    cluster = Cluster(0, 1, 0, np.zeros((1, 100, 100, 3), np.uint8), ['"<f>'], np.array([0]), 0, 100.0)
    page = "".join(html("<t>", "<c>", [cluster], "purest", ['"<b>']))
    assert "<b>" not in page and "<t>" not in page and "&quot;&lt;b&gt;: &quot;&lt;f&gt;" in page
    [data] = re.findall(r"base64,([^\"]+)", page)
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (64, 64)
