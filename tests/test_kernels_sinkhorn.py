"""Sinkhorn-Knopp against slow loops, on any number of ranks, and where the plain iteration makes NaN."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from ssl_dist.distributed.world import one_process
from ssl_dist.errors import Fault, RaisedOn
from ssl_dist.grid import Grid
from ssl_dist.kernels import sinkhorn
from tests import thread_world


def slow(P, lamb, tolerance):
    """The plain iteration on probabilities [N, K], as the official code writes it: labels, error, iterations."""
    num_rows, num_columns = P.shape
    A = P.T**lamb
    c, error, count = np.full(num_rows, 1 / num_rows), math.inf, 0
    while error > tolerance:
        r = (1 / num_columns) / (A @ c)
        new = (1 / num_rows) / (r @ A)
        if count % 10 == 0:
            error = np.abs(c / new - 1).sum()
        c, count = new, count + 1
    return (A * r[:, None] * c).argmax(0), error, count


def slow_in_logarithms(scores, lamb, tolerance):
    """The same on logits, in logarithms, where nothing can underflow."""
    num_rows, num_columns = scores.shape
    M = lamb * (scores - logsumexp(scores, 1, keepdims=True))
    c, error, count = np.full(num_rows, -math.log(num_rows)), math.inf, 0
    while error > tolerance:
        r = -math.log(num_columns) - logsumexp(M + c[:, None], 0)
        new = -math.log(num_rows) - logsumexp(M + r, 1)
        if count % 10 == 0:
            error = np.abs(np.expm1(c - new)).sum()
        c, count = new, count + 1
    return (M + r).argmax(1), error, count


def logits(num_rows, num_columns, seed=0, spread=3.0):
    return spread * np.random.default_rng(seed).standard_normal((num_rows, num_columns))


def run(scores, lamb=10.0, tolerance=0.1, world=None, num_rows=None, dtype=torch.float64):
    scores = torch.tensor(scores, dtype=dtype)
    return scores, sinkhorn.sinkhorn_knopp(scores, num_rows or len(scores), lamb, tolerance, world or one_process(), "")


@settings(max_examples=30)
@given(st.integers(2, 60), st.integers(2, 12), st.sampled_from([1.0, 5.0, 10.0]), st.integers(0, 99))
def test_labels_error_and_iterations_are_those_of_the_loop(num_rows, num_columns, lamb, seed):
    x = logits(num_rows, num_columns, seed, spread=1.0)
    labels, error, iterations = slow(np.exp(x - logsumexp(x, 1, keepdims=True)), lamb, 0.1)
    _, result = run(x, lamb)
    assert (result.labels.tolist(), result.iterations) == (labels.tolist(), iterations)
    assert result.error == pytest.approx(error, rel=1e-6, abs=1e-12)
    _, shifted = run(x + np.arange(num_rows)[:, None], lamb)  # logits: a row may be shifted
    assert torch.equal(shifted.labels, result.labels) and shifted.iterations == iterations


def test_the_transport_gives_every_row_and_every_cluster_its_share():
    A, result = run(logits(200, 7), 25.0, tolerance=1e-9)
    Q = result.rows[:, None] * A * result.columns
    torch.testing.assert_close(Q.sum(0), torch.full((7,), 1 / 7, dtype=Q.dtype), rtol=1e-9, atol=0)
    torch.testing.assert_close(Q.sum(1), torch.full((200,), 1 / 200, dtype=Q.dtype), rtol=1e-12, atol=0)
    assert result.labels.bincount().min() >= 200 // 7 - 2


SPREADS = [
    ("peaked", 25.0, 12.0, 0.0), ("dead clusters", 25.0, 2.0, -60.0), ("a living cluster", 25.0, 2.0, 60.0),
    ("large lambda", 300.0, 1.0, 0.0), ("flat", 25.0, 0.001, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lamb", "spread", "offset"), SPREADS)
def test_nothing_underflows(name, lamb, spread, offset):
    """Where p^lambda is 0 in float64: the labels are those of the iteration in logarithms."""
    x = logits(40, 5, spread=spread)
    x[:, :2] += [offset, 1.5 * offset]
    labels, error, iterations = slow_in_logarithms(x, lamb, 0.1)
    _, result = run(x, lamb)
    assert (result.labels.tolist(), result.iterations) == (labels.tolist(), iterations)
    assert result.error == pytest.approx(error, rel=1e-4, abs=1e-9)
    if offset < 0:
        with np.errstate(all="ignore"):
            assert np.isnan(slow(np.exp(x - logsumexp(x, 1, keepdims=True)), lamb, 0.1)[1]), "the official loop's end"


@pytest.mark.parametrize(("name", "lamb", "spread", "offset"), SPREADS)
def test_float32_makes_the_same_labels_where_its_own_exponentials_would_end(name, lamb, spread, offset):
    x = logits(40, 5, spread=spread)
    x[:, :2] += [offset, 1.5 * offset]
    x -= x.max(1, keepdims=True)
    _, double = run(x, lamb)
    A, single = run(x, lamb, dtype=torch.float32)
    assert A.dtype == torch.float32 and single.columns.dtype == single.rows.dtype == torch.float64
    assert (single.labels.tolist(), single.iterations) == (double.labels.tolist(), double.iterations)
    assert single.error == pytest.approx(double.error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("lamb", [10.0, 25.0, 100.0])
def test_float32_within_bounds_of_float64(lamb):
    """3,000 images: one in a thousand may get another label; scales agree to lambda times float32's rounding of scores
    and eight times that of the roots; rows and clusters have their shares of the transport."""
    x = logits(3000, 40)
    x -= x.max(1, keepdims=True)
    _, double = run(x, lamb, tolerance=1e-6)
    A, single = run(x, lamb, tolerance=1e-6, dtype=torch.float32)
    assert (single.labels != double.labels).sum() <= 3
    scale = (single.columns / double.columns).log()
    assert (scale - scale.mean()).abs().max() < lamb * 20 * 2**-24 + 8 * 2**-24
    Q = single.rows[:, None] * A.double() ** sinkhorn.ROOT * single.columns
    torch.testing.assert_close(Q.sum(0), torch.full((40,), 1 / 40, dtype=Q.dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(Q.sum(1), torch.full((3000,), 1 / 3000, dtype=Q.dtype), rtol=1e-12, atol=0)


def test_scores_beyond_float64_still_give_every_cluster_images():
    _, result = run(logits(300, 10, spread=300.0), 25.0)
    assert math.isfinite(result.error) and result.error <= 0.1
    assert result.labels.bincount(minlength=10).min() > 10


def _of_rank(world, x, lamb, bounds, dtype=torch.float64):
    own = slice(*bounds[world.rank_info.rank : world.rank_info.rank + 2])
    return run(x[own], lamb, world=world, num_rows=len(x), dtype=dtype)[1]


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@DTYPES
@pytest.mark.parametrize("bounds", [(0, 30, 60), (0, 1, 60), (0, 0, 60), (0, 20, 40, 60), (0, 15, 30, 45, 60)])
def test_any_number_of_ranks_makes_the_same_labels(bounds, dtype):
    """Rows split evenly and unevenly; one rank has none."""
    x = logits(60, 9)
    _, alone = run(x, 25.0, dtype=dtype)
    parts = thread_world.run(lambda world: _of_rank(world, x, 25.0, bounds, dtype), Grid(len(bounds) - 1, 1))
    assert torch.equal(torch.cat([part.labels for part in parts]), alone.labels)
    for part in parts:
        assert part.iterations == alone.iterations and part.error == pytest.approx(alone.error, rel=1e-9)
        assert torch.equal(part.columns, parts[0].columns)


def test_blocks_do_not_matter(monkeypatch):
    x = logits(60, 9)
    A, result = run(x)
    monkeypatch.setitem(sinkhorn.BLOCK_BYTES, "cpu", 7 * 9 * 8)
    B, again = run(x)
    assert torch.equal(result.labels, again.labels) and result.iterations == again.iterations
    torch.testing.assert_close(A, B, rtol=1e-12, atol=0)


@DTYPES
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 30, 31])
def test_the_compiled_half_step_is_that_of_torch(monkeypatch, num_rows, dtype):
    """Rows that fill no group of four, pieces that are not full, and threads that change nothing."""
    monkeypatch.setattr(sinkhorn, "PIECE_ROWS", 6)
    torch.manual_seed(0)
    stored, before = torch.rand(num_rows, 7, dtype=dtype), torch.rand(num_rows, dtype=torch.float64)
    A = stored if dtype == torch.float64 else stored.double() ** sinkhorn.ROOT
    r, half_steps = torch.rand(7, dtype=torch.float64), []
    for half_step, num_threads in ((sinkhorn._by_blocks, 1), (sinkhorn._by_loops, 1), (sinkhorn._by_loops, 3)):
        torch.set_num_threads(num_threads)
        c = before.clone()
        half_steps.append((half_step(stored, c, r, 40), c))
    new = 1 / (40 * (A @ r))
    for sums, c in half_steps:
        torch.testing.assert_close(c, new, rtol=1e-13, atol=0)
        torch.testing.assert_close(sums[:-1], new @ A, rtol=1e-13, atol=0)
        torch.testing.assert_close(sums[-1], (before / new - 1).abs().sum(), rtol=1e-13, atol=0)
    assert torch.equal(half_steps[1][0], half_steps[2][0]) and torch.equal(half_steps[1][1], half_steps[2][1])


@DTYPES
def test_the_code_path_of_gpus_makes_the_same_labels(monkeypatch, dtype):
    x = logits(60, 9)
    _, result = run(x, dtype=dtype)
    monkeypatch.setattr(sinkhorn, "_by_loops", sinkhorn._by_blocks)
    _, again = run(x, dtype=dtype)
    assert torch.equal(result.labels, again.labels) and result.iterations == again.iterations


def test_the_scores_are_worked_on_in_place():
    scores = torch.tensor(logits(50, 4))
    before = scores.data_ptr(), scores.clone()
    sinkhorn.sinkhorn_knopp(scores, 50, 10.0, 0.1, one_process(), "")
    assert scores.data_ptr() == before[0] and not torch.equal(scores, before[1])
    assert scores.amax(1).eq(1).all() and scores.amax(0).eq(1).all()


def test_the_phase_changes_every_ten_iterations():
    """A phase that changes counts as progress, however long the whole takes."""
    world, phases_and_bounds = one_process(), []
    reduce, world.all_reduce_sum = (
        world.all_reduce_sum,
        lambda x: phases_and_bounds.append((world.state.phase, world.state.bound)) or reduce(x),
    )
    _, result = run(logits(60, 9), 25.0, world=world)
    assert all(bound == sinkhorn.CHECK_TIMEOUT_S for _, bound in phases_and_bounds), "before the iterations, too"
    phases = [phase for phase, _ in phases_and_bounds if not phase.startswith("the exponentials")]
    assert len(phases) == result.iterations > 30 and len({*phases}) == (result.iterations - 1) // 10 + 1
    assert all(phase.startswith("Sinkhorn-Knopp") for phase in phases) and world.state.phase == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_end_the_run_on_all_ranks(bad):
    x = logits(60, 9)
    x[3, 4] = bad
    ends = thread_world.run(lambda world: _fault(lambda: _of_rank(world, x, 25.0, (0, 30, 60))), Grid(2, 1))
    assert all("not finite" in str(end) and end.raised_on is RaisedOn.EVERY_RANK for end in ends)


def test_a_transport_without_an_end_is_a_fault(monkeypatch):
    monkeypatch.setattr(sinkhorn, "MAX_ITERATIONS", 20)
    end = _fault(lambda: run(logits(200, 7), tolerance=0.0))
    assert "after 21 iterations" in str(end) and "tolerance" in str(end)


def _fault(action):
    with pytest.raises(Fault) as caught:
        action()
    return caught.value
