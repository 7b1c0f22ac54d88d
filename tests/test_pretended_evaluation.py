"""Evaluators on a pretended GPU: the CPU's values, and the host waits for the GPU by the block, never by the row."""

import json
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from ssl_dist import evaluators
from ssl_dist.evaluators import logistic
from ssl_dist.kernels import kmeans
from ssl_dist.storage.features import Features
from tests.pretended_cuda import CUDA, OnDevice, pretended


def part(count, seed, dim=24, classes=7):
    """Features of overlapping classes, and every eleventh row the same one."""
    generator = np.random.default_rng(seed)
    labels = np.append(np.arange(classes), generator.integers(0, classes, count - classes))
    centres = np.random.default_rng(5).standard_normal((classes, dim))
    rows = (centres[labels] + 1.3 * generator.standard_normal((count, dim))).astype(np.float32)
    rows[::11] = rows[0]
    return Features(rows, labels, np.arange(count), {"classes": json.dumps([])})


TRAIN, TEST = part(700, 0), part(150, 1)


# A block of knn and retrieval copies twice to the GPU and at most twice to the host; k-means waits by the centre and by
# the iteration, logistic regression by the iteration and block, its SGD by the epoch.
@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("knn", {}, 2 * 2 + 2),
        ("knn", {"k": [1, 700], "precision": "fp64"}, 2 * 2 + 2),
        ("knn", {"precision": "fp64", "memory_mb": 1}, 80),
        ("retrieval", {}, 4 * 2 + 1),
        ("retrieval", {"memory_mb": 1}, 80),
        ("retrieval", {"gallery": "test"}, 4 * 2 + 1),
        ("clusters", {"starts": 2, "number": 4}, 2 * 4 * 10 + 2 * 40 * 4),
        ("logistic", {}, 300),
        ("logistic", {"memory_mb": 1}, 350),
        ("logistic_sgd", {"epochs": 2}, 20),
    ],
)
def test_values_are_those_of_the_cpu(name, options, most, monkeypatch):
    evaluator = evaluators.find(name)
    options = evaluator.Options(**options)
    expected = evaluator.run(TRAIN, TEST, options)
    with pretended(monkeypatch, 1) as notes:
        values = evaluator.run(TRAIN, TEST, options, None, CUDA)
    assert values == expected
    assert sum(notes.kernels.values()) > 20, "did it run on the GPU?"
    assert 0 < sum(notes.waits.values()) <= most, dict(notes.waits)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("knn", {}),
        ("knn", {"precision": "fp64"}),
        ("retrieval", {}),
        ("clusters", {"limit": 1300, "starts": 1, "iterations": 1, "number": 20}),
        ("logistic", {"max_iter": 1}),
        ("logistic_sgd", {"epochs": 1, "batch_size": 2000}),
    ],
)
def test_the_budget_bounds_the_memory_of_the_gpu(name, options, monkeypatch):
    train, test = part(6000, 0, dim=64), part(40, 1, dim=64)
    monkeypatch.setitem(kmeans.BLOCK_BYTES, "cpu", 2**16)  # a block of so few rows is no smaller
    held = watched(monkeypatch)
    evaluator = evaluators.find(name)
    with pretended(monkeypatch, 1):
        evaluator.run(train, test, evaluator.Options(memory_mb=1, **options), None, CUDA)
    assert 0.3 < held.peak / 2**20 < 1, "a budget that is used, and kept"
    assert held.now == 0


class Held:
    """Bytes of the pretended GPU's tensors; views share theirs."""

    def __init__(self):
        self.bytes_of, self.tensors, self.peak = {}, Counter(), 0

    @property
    def now(self):
        return sum(self.bytes_of.values())

    def add(self, tensor):
        storage = tensor._real.untyped_storage()
        address = storage.data_ptr()
        self.bytes_of[address] = storage.nbytes()
        self.tensors[address] += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.remove, address)

    def remove(self, address):
        self.tensors[address] -= 1
        if not self.tensors[address]:
            del self.bytes_of[address]


def watched(monkeypatch):
    held, new = Held(), OnDevice.__new__

    def made(cls, real):
        tensor = new(cls, real)
        held.add(tensor)
        return tensor

    monkeypatch.setattr(OnDevice, "__new__", staticmethod(made))
    return held


def test_k_means_by_sums_in_another_order():
    """As another device rounds: the same clusters, and centres that agree to 1e-13 of the rows' squared lengths."""
    x_ND = torch.from_numpy(TRAIN.features[:300]).double()
    sums = [clustered(x_ND[:, order]) for order in (torch.arange(24), torch.arange(23, -1, -1), torch.randperm(24))]
    for labels, distance in sums[1:]:
        assert torch.equal(labels, sums[0][0])
        assert distance == pytest.approx(sums[0][1], rel=1e-13)


def clustered(x_ND):
    from ssl_dist.distributed.world import one_process

    return kmeans.kmeans(x_ND, torch.arange(len(x_ND)), len(x_ND), 6, np.uint64(3), one_process(), num_starts=3)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-9])
def test_logistic_regression_by_sums_in_another_order(tolerance):
    """Whatever rounds otherwise: objectives within the tolerance, and weights within the distance that follows."""
    options = logistic.Options(tolerance=tolerance)
    order = np.arange(TRAIN.dim)[::-1]
    one = logistic.fit(TRAIN, options)
    two = logistic.fit(Features(TRAIN.features[:, order], TRAIN.labels, TRAIN.image_ids, {}), options)
    assert one.converged and two.converged
    assert two.objective == pytest.approx(one.objective, rel=tolerance)
    apart = (one.weights[:, :-1] - two.weights[:, :-1].flip(1)).norm().item()
    assert apart <= (8 * tolerance * one.objective) ** 0.5
