"""Retrieval against scikit-learn and a slow loop, its order of ties, its memory, and what its pictures show."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from ssl_dist.device import CPU
from ssl_dist.errors import UserError
from ssl_dist.evaluators import retrieval
from ssl_dist.storage.features import Features
from tests import peak_memory
from tests.figure_writer import MemoryFigureWriter, drawn
from tests.messages import naming

# Directions with many equal cosines, and a row of zeros.
EXACT = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [1, 1, -1, -1], [-1, 1, -1, 1], [0, 0, 0, 0]])


def part(features, labels):
    features, labels = np.asarray(features, np.float32), np.asarray(labels, np.int64)
    return Features(features, labels, np.arange(len(labels)), {"classes": json.dumps([])}, "the file")


def named(part, split):
    metadata = {"split": split, "dataset": "shapes", "classes": json.dumps(["disc", "ring", "star"])}
    return replace(part, metadata=metadata)


def random_part(count, dim=6, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    return part(generator.standard_normal((count, dim)), np.append(generator.integers(0, classes, count - 2), [0, 1]))


def cosine(a, b):
    lengths = math.sqrt(sum(float(v) ** 2 for v in a)) * math.sqrt(sum(float(v) ** 2 for v in b))
    return sum(float(v) * float(w) for v, w in zip(a, b, strict=True)) / (lengths or 1.0)


def reference(gallery, queries, counts, leave_out=False):
    """One query, one image, one place of the list at a time."""
    values = {f"retrieval_top{k}": 0.0 for k in counts}
    values |= {f"retrieval_precision{k}": 0.0 for k in counts if k > 1} | {"retrieval_map": 0.0}
    for query, target in enumerate(queries.labels):
        candidates = [i for i in range(len(gallery)) if not (leave_out and i == query)]
        cosines = {i: round(cosine(queries.features[query], gallery.features[i]), 6) for i in candidates}
        matches = [gallery.labels[i] == target for i in sorted(candidates, key=lambda i: (-cosines[i], i))]
        for k in counts:
            values[f"retrieval_top{k}"] += any(matches[:k])
            if k > 1:
                values[f"retrieval_precision{k}"] += sum(matches[:k]) / k
        matched, total = 0, 0.0
        for place, match in enumerate(matches, 1):
            if match:
                matched += 1
                total += matched / place
        values["retrieval_map"] += total / matched if matched else 0.0
    return {name: value * 100 / len(queries) for name, value in values.items()}


def close(values, expected):
    assert list(values) == list(expected)
    np.testing.assert_allclose(list(values.values()), list(expected.values()), rtol=1e-12)


@pytest.fixture(params=["cpu", "gpu"])
def arithmetic(request, monkeypatch):
    """The ranking of the CPU, or that of a GPU, on the CPU."""
    if request.param == "gpu":
        as_on_a_gpu(monkeypatch)


def as_on_a_gpu(patch):
    patch.setattr(retrieval, "_rankings_on_cpu", partial(retrieval._rankings_on_gpu, device=CPU))


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("gallery", ["train", "test"])
def test_equals_the_slow_reference(gallery):
    train, test = random_part(61), random_part(37, seed=1)
    values = retrieval.run(train, test, retrieval.Options(k=[20, 1, 5], gallery=gallery))
    close(values, reference(test if gallery == "test" else train, test, [1, 5, 20], gallery == "test"))


def test_average_precision_is_scikit_learns():
    """Where cosines differ its score of a query is the mean that is reported."""
    train, test = random_part(300, 16), random_part(40, 16, seed=1)
    unit_train, unit_test = (p.features / np.linalg.norm(p.features, axis=1, keepdims=True) for p in (train, test))
    cosines = unit_test.astype(np.float64) @ unit_train.astype(np.float64).T
    scores = [average_precision_score(train.labels == y, row) for y, row in zip(test.labels, cosines, strict=True)]
    mean = retrieval.run(train, test, retrieval.Options())["retrieval_map"]
    assert mean == pytest.approx(100 * np.mean(scores), rel=1e-12)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(["train", "test"]), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_ties_take_the_lower_image_id_whatever_the_blocks(data, gallery, num_queries, num_rows, on_gpu):
    def draw(count):
        return data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))

    train, test = part(EXACT[draw(12)], [*draw(10), 0, 1]), part(EXACT[draw(5)], draw(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_block_sizes", lambda *_: (num_queries, num_rows))
        patch.setattr(retrieval, "_block_sizes_on_gpu", lambda *_: (num_queries, num_rows, max(1, num_queries - 1)))
        if on_gpu:
            as_on_a_gpu(patch)
        values = retrieval.run(train, test, retrieval.Options(k=[1, 3], gallery=gallery))
    close(values, reference(test if gallery == "test" else train, test, [1, 3], gallery == "test"))


@pytest.mark.usefixtures("arithmetic")
def test_of_collapsed_features_the_order_is_that_of_ids():
    train, test = part(np.ones((50, 3)), np.arange(50) % 5), part(np.ones((7, 3)) * 2, [0, 1, 2, 3, 4, 0, 1])
    ((start, keys),) = retrieval.rankings(test, train, False, 1 << 20)
    assert start == 0 and ((keys & retrieval._ROW_MASK) == np.arange(50)).all()
    ((_, keys),) = retrieval.rankings(test, test, True, 1 << 20)
    assert (keys & retrieval._ROW_MASK).tolist() == [[i for i in range(7) if i != query] for query in range(7)]


@pytest.mark.usefixtures("arithmetic")
def test_the_nearest_are_distinguished_down_to_a_billionth():
    """Cosines 1 - 2e-9 and 1: float32 rounds both to 1."""
    train = part([[1, 6e-5, 0], [1, 0, 0], [0, 1, 0]], [0, 1, 0])
    assert retrieval.run(train, part([[1, 0, 0]], [1]), retrieval.Options(k=[1]))["retrieval_top1"] == 100


@pytest.mark.usefixtures("arithmetic")
def test_opposite_features_are_the_farthest():
    train = part([[-1, 0, 0], [0, 1, 0], [1, 0, 0]], [1, 0, 0])
    ((_, keys),) = retrieval.rankings(part([[2, 0, 0]], [0]), train, False, 1 << 20)
    assert (keys & retrieval._ROW_MASK).tolist() == [[2, 1, 0]]
    assert (keys >> np.uint64(32)).tolist() == [[0, 2**30, 2**31]]


@pytest.mark.usefixtures("arithmetic")
def test_threads_and_blocks_change_nothing():
    import torch

    train, test = random_part(400, 16), random_part(57, 16, seed=1)
    whole = retrieval.run(train, test, retrieval.Options())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_block_sizes", lambda *_: (5, 33))
        patch.setattr(retrieval, "_block_sizes_on_gpu", lambda *_: (5, 33, 2))
        torch.set_num_threads(2)
        assert retrieval.run(train, test, retrieval.Options()) == whole


@pytest.mark.parametrize("count", [2, 7, 100, 101])
def test_any_number_of_queries_each_counted_once(count):
    train = random_part(50)
    test = part(*(np.resize(a, (count, *a.shape[1:])) for a in (train.features[:7], train.labels[:7])))
    assert retrieval.run(train, test, retrieval.Options(k=[1]))["retrieval_top1"] == 100.0


def test_a_class_that_cannot_be_found_counts_as_nothing(caplog):
    train = part(EXACT[:4], [0, 1, 0, 1])
    values = retrieval.run(train, part(EXACT[:2], [0, 7]), retrieval.Options(k=[1, 4]))
    assert values == {
        "retrieval_top1": 50, "retrieval_top4": 50, "retrieval_precision4": 25,
        "retrieval_map": 100 * (1 + 2 / 4) / 2 / 2,
    }  # fmt: skip
    assert "1 of 2 queries" in caplog.text
    caplog.clear()
    alone = part(EXACT[:3], [0, 0, 1])  # the third has nobody but itself
    assert retrieval.run(train, alone, retrieval.Options(k=[1], gallery="test"))["retrieval_top1"] < 100
    assert "1 of 3 queries" in caplog.text


def test_the_default_goes_without_more_than_there_are(caplog):
    values = retrieval.run(random_part(12), random_part(10, seed=1), retrieval.Options())
    assert {"retrieval_top1", "retrieval_top5", "retrieval_top10"} <= values.keys()  # 10: relational reasoning's
    assert "retrieval_top20" not in values and "retrieval.k = 20 left out" in caplog.text
    assert "retrieval_top20" in retrieval.run(random_part(20), random_part(10, seed=1), retrieval.Options())


def test_what_is_refused():
    train, test = random_part(30), random_part(10, seed=1)
    with pytest.raises(UserError, match=naming("retrieval.k = 31", 30, 30)):
        retrieval.run(train, test, retrieval.Options(k=[31, 1]))
    with pytest.raises(UserError, match=naming("retrieval.k = 10", 9)):
        retrieval.run(train, test, retrieval.Options(k=[10], gallery="test"))
    with pytest.raises(UserError, match="no label"):
        retrieval.run(train, part(test.features, [-1] * 10), retrieval.Options())
    with pytest.raises(UserError, match="do not belong together"):
        retrieval.run(train, random_part(10, dim=7), retrieval.Options())


@pytest.mark.parametrize("gallery", ["train", "test"])
def test_the_pictures(gallery):
    train, test = (named(random_part(n, classes=3, seed=n), split) for n, split in ((90, "train"), (40, "test")))
    options = retrieval.Options(gallery=gallery, queries=6)
    writer = MemoryFigureWriter()
    assert retrieval.run(train, test, options, writer) == retrieval.run(train, test, options)
    prefix = "retrieval" if gallery == "train" else "retrieval-within"
    assert list(writer.pictures) == [f"{prefix}-confusion", f"{prefix}-classes", f"{prefix}-nearest"]
    for figure, title, caption in writer.pictures.values():
        drawn(figure)
        assert title and "\n" not in caption

    texts, shown = writer.texts(f"{prefix}-nearest"), writer.images_shown(f"{prefix}-nearest")
    searched = train if gallery == "train" else test
    order = np.concatenate([keys for _, keys in retrieval.rankings(test, searched, gallery == "test", 1 << 20)])
    order = (order & retrieval._ROW_MASK).astype(int)
    queries = [shown[i : i + 11] for i in range(0, len(shown), 11)]  # one and its ten nearest, as in the paper
    assert len(queries) == 6
    for (split, query), *nearest in queries:
        assert split == "test" and [i for _, i in nearest] == order[query, :10].tolist()
        assert {where for where, _ in nearest} == {gallery}
    right = [int(searched.labels[order[query, 0]] == test.labels[query]) for (_, query), *_ in queries]
    assert right == [1, 1, 1, 0, 0, 0], "half of them are failures"
    assert [test.labels[query] for (_, query), *_ in queries] == [0, 1, 2] * 2, "evenly over the classes"
    assert f"{len(searched)} images of shapes {gallery}" in writer.pictures[f"{prefix}-nearest"][2]
    share = (searched.labels[order[:, 0]] == test.labels).mean() * 100
    assert f"nearest image of the same class ({share:.1f} % of queries)" in texts
    wrong = sum(searched.labels[i] != test.labels[query] for (_, query), *nearest in queries for _, i in nearest)
    assert sum(text in ("disc", "ring", "star") for text in texts) == 6 + wrong, "queries and failures are named"


@pytest.mark.usefixtures("arithmetic")
def test_of_a_split_alone_without_classes(monkeypatch):
    """The cosine, the list and the pairs of the picture by slow loops."""
    images = replace(named(random_part(30), "test"), labels=np.full(30, -1))
    writer, options = MemoryFigureWriter(), retrieval.Options(queries=6)
    values = retrieval.run(images, images, options, writer)
    nearest = {}
    for query in range(30):
        cosines = {i: cosine(images.features[query], images.features[i]) for i in range(30) if i != query}
        nearest[query] = sorted(cosines.items(), key=lambda pair: -pair[1])[:10]
    best = [found[0][1] for found in nearest.values()]
    assert values == {"retrieval_nearest_cosine": pytest.approx(np.mean(best), abs=1e-9)}
    header, *rows = writer.tables["retrieval-nearest"]
    assert header == ("image_id", "file", "place", "nearest_id", "nearest_file", "cosine")
    assert rows == [
        (query, f"test/{query}.jpg", place, i, f"test/{i}.jpg", f"{value:.6f}")
        for query, found in nearest.items()
        for place, (i, value) in enumerate(found, 1)
    ]
    assert list(writer.pictures) == ["retrieval-nearest"]
    figure, _, caption = writer.pictures["retrieval-nearest"]
    drawn(figure)
    assert "which has no classes" in caption and "All queries: figures/retrieval-nearest.csv." in caption
    shown = [i for _, i in writer.images_shown("retrieval-nearest")]
    rows = [shown[start : start + 11] for start in range(0, 66, 11)]
    assert len(shown) == 66 and all(row[1:] == [i for i, _ in nearest[row[0]]] for row in rows)
    similar = [row[0] for row in rows[:3]]
    assert similar[0] in np.argsort(best)[-2:] and not any(
        query in row for k, query in enumerate(similar) for row in rows[:k]
    )
    assert {f"{nearest[similar[0]][0][1]:.3f}", f"{similar[0]}"} <= set(writer.texts("retrieval-nearest"))
    monkeypatch.setattr(retrieval, "_NUM_LISTED", 7)
    retrieval.run(images, images, options, writer)
    assert (
        len(writer.tables["retrieval-nearest"]) == 71
        and "The first 7 queries" in writer.pictures["retrieval-nearest"][2]
    )
    with pytest.raises(UserError, match="one image has no other"):
        retrieval.run(one := images.subset(np.arange(1)), one, options)
    with pytest.raises(UserError, match=r"no label|at least two classes"):
        retrieval.run(images, named(random_part(9), "test"), options)


def test_of_a_split_alone_with_classes():
    images = random_part(40)
    values = retrieval.run(images, images, retrieval.Options())
    close(values, retrieval.run(random_part(9, seed=1), images, retrieval.Options(gallery="test")))


def test_the_keys_are_the_cpus():
    """Bit for bit, where no cosine lies on the border of two multiples of 2^-30."""
    train, test = random_part(500, 24), random_part(60, 24, seed=1)
    keys = np.concatenate([keys.copy() for _, keys in retrieval.rankings(test, train, False, 1 << 20)])
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch)
        blocks = list(retrieval.rankings(test, train, False, 1 << 17))
    assert len(blocks) > 2
    np.testing.assert_array_equal(np.concatenate([keys for _, keys in blocks]), keys)


MEMORY = """
import sys
from ssl_dist.evaluators import retrieval
from ssl_dist.storage.features import read_features
from tests.peak_memory import peak_mib

train, test = read_features(sys.argv[1]), read_features(sys.argv[2])
retrieval.run(test, test, retrieval.Options())  # lets the libraries take what they take once
print(peak_mib(lambda: retrieval.run(train, test, retrieval.Options(memory_mb=16))))
"""


@pytest.mark.slow
@peak_memory.needs_linux
def test_memory_is_bounded_by_the_budget_on_a_mapped_file(tmp_path):
    from ssl_dist.storage.features import METADATA, write_features

    metadata = dict.fromkeys(METADATA, "x") | {"classes": "[]"}
    paths = [str(tmp_path / name) for name in ("train", "test")]
    tile = np.random.default_rng(0).standard_normal((1000, 256), dtype=np.float32)
    for path, count in zip(paths, (64_000, 100), strict=True):  # 62 MiB, and keys of 49 MiB
        ids = np.arange(count)
        write_features(path, np.resize(tile, (count, 256)), ids % 10, ids, metadata)

    assert float(peak_memory.run(MEMORY, *paths)) < 24  # a budget of 16, and folios
