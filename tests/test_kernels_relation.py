"""The fused relation sweep against torch: values, gradients, any share of the pairs, any number of threads."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_dist.grid import Grid
from ssl_dist.kernels.relation import Share, relation_loss
from ssl_dist.keys import hash64
from ssl_dist.methods.relational import couples, focal_bce, unit_rows
from tests import thread_world

ROOT = Path(__file__).parent.parent
NAMES = ("A", "B", "bn_weight", "bn_bias", "w", "c")


class Problem:
    """Random A, B and head; `gamma` and `alpha` of the loss."""

    def __init__(self, num_views, num_images, hidden, gamma=2.0, alpha=0.5, seed=0, dtype=torch.float64):
        torch.manual_seed(seed)
        self.sizes, self.gamma, self.alpha = (num_views, num_images), gamma, alpha
        self.bn, self.last = nn.BatchNorm1d(hidden).to(dtype), nn.Linear(hidden, 1).to(dtype)
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)
        self.A, self.B = (torch.randn(num_views * num_images, hidden, dtype=dtype) for _ in range(2))
        self.couples = couples(num_views, num_images, hash64(seed) if seed % 2 else None)
        self.num_units = num_views * (num_views - 1) // 2 * num_images
        # three classes, and images whose label is not known; without the seed's draw: no labels at all
        self.labels = torch.randint(-1, 3, (num_images,)) if seed % 3 else torch.full((num_images,), -1)

    def share(self, lo=0, hi=None):
        hi = self.num_units if hi is None else hi
        return Share(self.couples, self.sizes[1], lo, hi)

    def leaves(self):
        return [x.detach().clone().requires_grad_() for x in (
            self.A, self.B, self.bn.weight, self.bn.bias, self.last.weight, self.last.bias
        )]  # fmt: skip

    def by_torch(self):
        """Loss, logits [2, units], gradients, mean and biased variance; of ours only the index arithmetic."""
        leaves = A, B, weight, bias, w, c = self.leaves()
        left, positive, negative = unit_rows(self.couples, self.sizes[1])
        h = torch.cat([A[left] + B[positive], A[left] + B[negative]])
        y = nn.functional.batch_norm(h, None, None, weight, bias, True, 0.0, self.bn.eps)
        logits = (nn.functional.leaky_relu(y, 0.01) @ w[0] + c).view(2, -1)
        one, other = (self.labels[rows % self.sizes[1]] for rows in (left, negative))
        target = torch.stack([torch.ones_like(left), ((one == other) & (one >= 0)).long()])
        loss = focal_bce(logits, target, self.gamma, self.alpha).mean()
        gradients = torch.autograd.grad(loss, leaves)
        return loss.detach(), logits.detach(), gradients, h.detach().mean(0), h.detach().var(0, correction=0)

    def by_sweep(self, lo=0, hi=None, reduce=lambda x: x, loss_of=relation_loss):
        leaves = A, B, weight, bias, w, c = self.leaves()
        bn, last = nn.BatchNorm1d(A.shape[1]), nn.Linear(A.shape[1], 1)
        bn.weight, bn.bias, last.weight, last.bias = map(nn.Parameter, (weight, bias, w, c))
        share = self.share(lo, hi)
        loss, logits, mean, var = loss_of(A, B, bn, 0.01, last, self.gamma, self.alpha, share, self.labels, reduce)
        loss.backward()
        gradients = [A.grad, B.grad, *(p.grad for p in (bn.weight, bn.bias, last.weight, last.bias))]
        assert len(leaves) == len(gradients)
        return loss.detach(), logits, gradients, mean, var


def close(ours, expected, tolerance):
    """Relative to the largest magnitude of the array."""
    assert ours.shape == expected.shape
    if expected.numel():
        error = (ours.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"relative error {error:.2e}"


def compare(ours, expected, tolerance):
    for a, b in zip(ours[:2] + ours[3:], expected[:2] + expected[3:], strict=True):
        close(a, b, tolerance)
    for name, a, b in zip(NAMES, ours[2], expected[2], strict=True):
        assert a.dtype == b.dtype, name
        close(a, b, tolerance)


sizes = st.integers(2, 6), st.integers(1, 8), st.sampled_from([1, 3, 16, 37])


@settings(max_examples=30)
@given(*sizes, st.sampled_from([0.0, 0.7, 1.0, 2.0, 3.5]), st.sampled_from([None, 0.0, 0.3]), st.integers(0, 99))
def test_it_equals_torch_in_float64(num_views, num_images, hidden, gamma, alpha, seed):
    problem = Problem(num_views, num_images, hidden, gamma, alpha, seed)
    compare(problem.by_sweep(), problem.by_torch(), 1e-10)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 1.5])
def test_it_equals_torch_in_float32(gamma):
    problem = Problem(6, 12, 256, gamma, dtype=torch.float32)
    compare(problem.by_sweep(), problem.by_torch(), 1e-5)


@settings(max_examples=20)
@given(*sizes, st.data())
def test_ragged_shares_add_up(num_views, num_images, hidden, data):
    """Also empty ones, and cuts inside a couple of views."""
    problem = Problem(num_views, num_images, hidden, seed=data.draw(st.integers(0, 99)))
    cuts = sorted(data.draw(st.lists(st.integers(0, problem.num_units), min_size=2, max_size=2)))
    bounds = [0, *cuts, problem.num_units]

    def rank(world):
        return problem.by_sweep(*bounds[world.rank_info.rank :][:2], world.all_reduce_sum)

    parts = thread_world.run(rank, Grid(3, 1))
    joined = (
        sum(part[0] for part in parts),
        torch.cat([part[1] for part in parts], 1),
        [sum(grads) for grads in zip(*(part[2] for part in parts), strict=True)],
        *parts[0][3:],
    )
    compare(joined, problem.by_torch(), 1e-10)
    assert all(torch.equal(part[3], parts[0][3]) for part in parts), "every rank has the same moments"


def test_the_number_of_threads_changes_no_bit():
    problem = Problem(5, 7, 48, dtype=torch.float32)
    results = []
    for num_threads in (1, 2, 3, 16):
        torch.set_num_threads(num_threads)
        results.append(problem.by_sweep(3, problem.num_units - 2))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(other[2], results[0][2], strict=True))


WARM_UP = """
import torch
from ssl_dist.kernels import relation_loops
from ssl_dist.kernels.relation import warm_up
from tests.test_kernels_relation import Problem
compiled = [function for function in vars(relation_loops).values() if hasattr(function, "signatures")]
counts = lambda: [len(function.signatures) for function in compiled]
assert sum(counts()) == 0 and len(compiled) > 5
for number, dtype in enumerate((torch.float32, torch.float64), 1):
    warm_up(dtype)
    before = counts()
    assert max(before) == number
    Problem(3, 4, 8, dtype=dtype).by_sweep()
    assert counts() == before, "the first step compiled something"
"""


@pytest.mark.slow
def test_warm_up_compiles_what_training_calls():
    """What it leaves out would be compiled in the first step, while other ranks wait; in a process that is new."""
    done = subprocess.run([sys.executable, "-c", WARM_UP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_shows_in_the_loss(bad):
    problem = Problem(3, 4, 8)
    problem.A[2, 5] = bad
    assert not problem.by_sweep()[0].isfinite()


def test_extreme_logits_stay_finite():
    problem = Problem(3, 4, 8, gamma=2.0)
    problem.last.weight.data *= 1e4
    loss, _, gradients, *_ = problem.by_sweep()
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    compare(problem.by_sweep(), problem.by_torch(), 1e-9)


def test_a_batchnorm_weight_of_zero_divides_nothing():
    problem = Problem(3, 4, 8)
    nn.init.zeros_(problem.bn.weight)
    compare(problem.by_sweep(), problem.by_torch(), 1e-10)


def test_backward_scales_and_can_run_twice():
    problem = Problem(3, 4, 8)
    share = problem.share()
    A, B = problem.A.requires_grad_(), problem.B
    loss, *_ = relation_loss(A, B, problem.bn, 0.01, problem.last, 2.0, 0.5, share, problem.labels, lambda x: x)
    (one,) = torch.autograd.grad(loss, A, retain_graph=True)
    (three,) = torch.autograd.grad(3 * loss, A)
    torch.testing.assert_close(three, 3 * one)


def test_nothing_of_the_size_of_the_pairs_times_hidden_is_kept():
    """K = 24, M = 16, hidden 64: 8,832 pairs x 64 would be 4.5 MB in float64; a matrix of rows is 0.2 MB."""
    import tracemalloc

    problem = Problem(24, 16, 64)
    problem.by_sweep()
    tracemalloc.start()
    problem.by_sweep()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * problem.A.numel() * 8 < np.prod((2 * problem.num_units, 64)) * 8
