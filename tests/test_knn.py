"""Weighted kNN against a slow reference, its order of ties, and its memory."""

import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_dist.device import CPU
from ssl_dist.errors import UserError
from ssl_dist.evaluators import knn
from ssl_dist.kernels import neighbours
from ssl_dist.storage.features import Features
from tests import peak_memory
from tests.messages import naming

# Directions whose cosines are exact in floating point: multiples of a half or a quarter, many of them equal.
EXACT = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [1, 1, -1, -1], [-1, 1, -1, 1], [0, 0, 0, 0]])


def part(features, labels, classes=()):
    features, labels = np.asarray(features, np.float32), np.asarray(labels, np.int64)
    return Features(features, labels, np.arange(len(labels)), {"classes": json.dumps(list(classes))}, "the file")


def random_part(count, dim=6, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    return part(generator.standard_normal((count, dim)), np.append(generator.integers(0, classes, count - 2), [0, 1]))


def reference(train, test, k, temperature, num_classes):
    """One image, one neighbour, one vote at a time."""

    def length(row):
        return math.sqrt(sum(float(v) ** 2 for v in row)) or 1.0

    top1 = top5 = 0
    for query, target in zip(test.features, test.labels, strict=True):
        cosines = []
        for other in train.features:
            product = sum(float(a) * float(b) for a, b in zip(query, other, strict=True))
            cosines.append(product / length(query) / length(other))
        nearest = sorted(range(len(train)), key=lambda i: (-cosines[i], i))[:k]
        votes = [0.0] * num_classes
        for i in nearest:
            votes[train.labels[i]] += math.exp(cosines[i] / temperature)
        order = sorted(range(num_classes), key=lambda c: (-votes[c], c))
        top1 += target in order[:1]
        top5 += target in order[: min(5, k)]
    return top1 * 100.0 / len(test), top5 * 100.0 / len(test)


@pytest.fixture(params=["cpu", "gpu"])
def arithmetic(request, monkeypatch):
    """The cosines of the CPU, or those of a GPU, on the CPU."""
    if request.param == "gpu":
        as_on_a_gpu(monkeypatch)


def as_on_a_gpu(patch):
    patch.setattr(neighbours, "_rounded_neighbours", partial(neighbours._exact_neighbours, device=CPU))


@pytest.mark.usefixtures("arithmetic")
def test_equals_the_slow_reference_for_every_k_and_temperature():
    train, test = random_part(60), random_part(33, seed=1)
    values = knn.run(train, test, knn.Options(k=[7, 1, 60], temperature=[0.07, 0.5], precision="fp64"))
    expected = {}
    for k in (1, 7, 60):
        for temperature, suffix in ((0.07, ""), (0.5, "_T0.5")):
            top1, top5 = reference(train, test, k, temperature, 5)
            expected |= {f"knn{k}{suffix}_top1": top1, f"knn{k}{suffix}_top5": top5}
    assert values == expected


def unit(rows):
    return rows / np.maximum(1e-9, np.linalg.norm(rows.astype(float), axis=1, keepdims=True))  # zeros stay zero


@settings(max_examples=40)
@given(
    st.data(),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["fp32", "fp64"]),
    st.booleans(),
)
def test_ties_take_the_lower_image_id_and_the_lower_class_whatever_the_blocks(
    data, k, num_queries, num_rows, precision, on_gpu
):
    def draw(count):
        return data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))

    train, test = part(EXACT[draw(12)], [*draw(10), 0, 1]), part(EXACT[draw(4)], draw(4))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_block_sizes", "_exact_block_sizes"):
            patch.setattr(neighbours, name, lambda *_: (num_queries, num_rows))
        if on_gpu:
            as_on_a_gpu(patch)
        values = knn.run(train, test, knn.Options(k=[k], temperature=[1.0], precision=precision))
        blocks = list(neighbours.neighbours(train, test, k, torch.float64, 1))
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    assert tuple(values.values()) == reference(train, test, k, 1.0, num_classes)

    rows = torch.cat([rows for _, _, rows in blocks])
    cosines = torch.cat([cosine for _, cosine, _ in blocks])
    exact = (unit(test.features) @ unit(train.features).T).round(6)
    for query in range(4):
        expected = sorted(range(12), key=lambda i: (-exact[query, i], i))[:k]
        assert rows[query].tolist() == expected
        np.testing.assert_allclose(cosines[query], exact[query, expected], atol=1e-6)


@pytest.mark.usefixtures("arithmetic")
def test_of_many_equal_neighbours_the_lowest_ids_are_kept():
    """Collapsed features: all cosines are 1, but for some that are -1."""
    sign = np.where(np.arange(300) % 3 == 0, -1, 1)
    train = part(sign[:, None] * EXACT[0], np.arange(300) % 2)
    ((_, cosine, rows),) = neighbours.neighbours(train, part(EXACT[:1], [0]), 250, torch.float32, 1 << 20)
    assert rows[0].tolist() == [*np.flatnonzero(sign > 0), *np.flatnonzero(sign < 0)[:50]]
    assert cosine[0].tolist() == [1.0] * 200 + [-1.0] * 50


@pytest.mark.usefixtures("arithmetic")
def test_blocks_change_nothing():
    train, test = random_part(300, 16), random_part(57, 16, seed=1)
    whole = next(iter(neighbours.neighbours(train, test, 40, torch.float64, 1 << 30)))
    parts = list(neighbours.neighbours(train, test, 40, torch.float64, 1 << 16))
    assert len(parts) > 1 and parts[0][0] == 0
    torch.testing.assert_close(torch.cat([rows for _, _, rows in parts]), whole[2])
    torch.testing.assert_close(torch.cat([cosine for _, cosine, _ in parts]), whole[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 250])
def test_any_number_of_test_images_each_counted_once(count):
    """The official codes cut the test set into count // 100 images and fail below 100."""
    train = random_part(50)
    test = part(*(np.resize(a, (count, *a.shape[1:])) for a in (train.features[:7], train.labels[:7])))
    assert knn.run(train, test, knn.Options(k=[1])) == {"knn1_top1": 100.0, "knn1_top5": 100.0}
    wrong = part(test.features, np.append(test.labels[:-1], (test.labels[-1] + 1) % 5))
    assert knn.run(train, wrong, knn.Options(k=[1]))["knn1_top1"] == (count - 1) * 100.0 / count


def test_a_class_that_the_training_split_lacks_is_wrong():
    train = part(EXACT[:4], [0, 1, 0, 1])
    assert knn.run(train, part(EXACT[:2], [0, 7]), knn.Options(k=[4]))["knn4_top1"] == 50.0


def test_every_temperature_counts_once_under_a_name_of_its_own():
    """0.10000001 is 0.1 to six digits."""
    train, test = random_part(40), random_part(20, seed=1)
    given = [0.1, 0.07, 0.1, 0.10000001, 0.070000001, 1, 1.0, 1000000.0, 0.1]
    values = knn.run(train, test, knn.Options(k=[5, 5], temperature=given))
    suffixes = {"": 0.07, "_T0.1": 0.1, "_T0.10000001": 0.10000001, "_T0.070000001": 0.070000001, "_T1": 1}
    suffixes |= {"_T1e+06": 1e6}
    assert values.keys() == {f"knn5{suffix}_top{n}" for suffix in suffixes for n in (1, 5)}
    for suffix, temperature in suffixes.items():
        alone = knn.run(train, test, knn.Options(k=[5], temperature=[temperature]))
        assert values[f"knn5{suffix}_top1"] == alone[f"knn5{suffix}_top1"] <= 100
    # what was recorded of a list with repetitions is of other options, so it is measured again
    assert knn.Options(temperature=[0.5, 0.1, 0.5]) == knn.Options(temperature=[0.5, 0.1])


@pytest.mark.usefixtures("arithmetic")
def test_small_temperatures_stay_finite():
    train, test = random_part(40), random_part(20, seed=1)
    values = knn.run(train, test, knn.Options(k=[5], temperature=[0.005]))
    assert values["knn5_T0.005_top1"] == reference(train, test, 5, 0.005, 5)[0]


def test_more_neighbours_than_images():
    train, test = random_part(30), random_part(10, seed=1)
    with pytest.raises(UserError, match=naming("knn.k = 31", 30, "knn.k=", 30)):
        knn.run(train, test, knn.Options(k=[5, 31]))
    with pytest.raises(UserError, match=naming("knn.k = null", 19)):
        knn.run(random_part(19), test, knn.Options())


def test_the_default_says_what_it_leaves_out(caplog):
    test = random_part(10, seed=1)
    assert set(knn.run(random_part(30), test, knn.Options())) == {"knn20_top1", "knn20_top5"}
    assert re.search(naming("k = 200", 30), caplog.text)
    caplog.clear()
    assert set(knn.run(random_part(200), test, knn.Options())) == {f"knn{k}_top{n}" for k in (20, 200) for n in (1, 5)}
    assert not caplog.records


def test_labels_and_files_must_fit():
    train, test = random_part(30), random_part(10, seed=1)
    with pytest.raises(UserError, match="no label"):
        knn.run(train, part(test.features, [-1] + [0] * 9), knn.Options(k=[1]))
    with pytest.raises(UserError, match="at least two classes"):
        knn.run(part(train.features, [3] * 30), test, knn.Options(k=[1]))
    with pytest.raises(UserError, match="do not belong together"):
        knn.run(train, random_part(10, dim=7), knn.Options(k=[1]))


MEMORY = """
import sys, torch
from functools import partial
from ssl_dist.evaluators import knn
from ssl_dist.kernels import neighbours
from ssl_dist.storage.features import read_features
from tests.peak_memory import peak_mib

if sys.argv[3] == "gpu":  # what it would hold there is held here, beside what the host holds
    neighbours._rounded_neighbours = partial(neighbours._exact_neighbours, device=torch.device("cpu"))
train, test = read_features(sys.argv[1]), read_features(sys.argv[2])
knn.run(test, test, knn.Options(k=[20]))  # compiles, and lets the libraries take what they take once
print(peak_mib(lambda: knn.run(train, test, knn.Options(k=[20], memory_mb=16))))
"""


@peak_memory.needs_linux
@pytest.mark.parametrize("arithmetic", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_memory_is_bounded_by_the_budget_on_a_mapped_file(tmp_path, arithmetic):
    from ssl_dist.storage.features import METADATA, write_features

    metadata = dict.fromkeys(METADATA, "x") | {"classes": "[]"}
    paths = [str(tmp_path / name) for name in ("train", "test")]
    tile = np.random.default_rng(0).standard_normal((1000, 256), dtype=np.float32)
    for path, count in zip(paths, (64_000, 200), strict=True):  # 62 MiB, and cosines of 49 MiB
        ids = np.arange(count)
        write_features(path, np.resize(tile, (count, 256)), ids % 10, ids, metadata)
    assert float(peak_memory.run(MEMORY, *paths, arithmetic)) < 24  # a budget of 16, and folios
