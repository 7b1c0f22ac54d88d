"""Whitening and k-means: against slow references, on any number of ranks, and with degenerate rows."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from ssl_dist.distributed.world import one_process
from ssl_dist.grid import Grid
from ssl_dist.kernels import kmeans
from ssl_dist.keys import hash64
from tests import thread_world

KEY = hash64(1, 2)


def rows(count=300, dim=8, groups=6, seed=0, spread=0.4):
    torch.manual_seed(seed)
    centres = torch.randn(groups, dim, dtype=torch.float64)
    return centres[torch.arange(count) % groups] + spread * torch.randn(count, dim, dtype=torch.float64)


def cluster(x, k, key=KEY, world=None, positions=None, count=None, **more):
    positions = torch.arange(len(x)) if positions is None else positions
    return kmeans.kmeans(x, positions, count or len(x), k, key, world or one_process(), **more)


def own_rows(world, x, interleaved):
    if interleaved:
        return torch.arange(world.rank_info.rank, len(x), world.rank_info.world_size)
    low, high = world.share(len(x))
    return torch.arange(low, high)


# ---------------------------------------------------------------------------------------------------- whitening


def test_whitening_is_that_of_the_formula():
    x = rows() * torch.arange(1, 9) + 5
    white = kmeans.whiten(x.float(), 5, one_process())
    centred = x.float().double() - x.float().double().mean(0)
    values, axes = np.linalg.eigh(np.cov(centred.T.numpy(), bias=True))
    expected = torch.from_numpy(centred.numpy() @ axes[:, -5:] / np.sqrt(values[-5:]))
    assert white.dtype == torch.float64
    torch.testing.assert_close(expected.square().mean(0), torch.ones(5).double())
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close((white * expected).sum(0).abs(), expected.square().sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(white @ white.T, expected @ expected.T, rtol=0, atol=1e-9)


def test_a_dead_channel_stays_dead():
    x = rows()
    wide = torch.cat([x, torch.zeros(len(x), 1), x[:, :1] * 1e-12], 1)
    white = kmeans.whiten(wide, 10, one_process())
    narrow = kmeans.whiten(x, 8, one_process())
    torch.testing.assert_close(white @ white.T, narrow @ narrow.T, rtol=0, atol=1e-6)


def test_features_that_are_all_equal_stay_finite():
    assert kmeans.whiten(torch.full((20, 4), 0.1), 4, one_process()).isfinite().all()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("interleaved", [False, True])
def test_whitening_by_any_number_of_ranks(size, interleaved):
    x = rows(100)
    alone = kmeans.whiten(x, 5, one_process())

    def part(world):
        own = own_rows(world, x, interleaved)
        return own, kmeans.whiten(x[own], 5, world)

    joined = torch.empty_like(alone)
    for own, white in thread_world.run(part, Grid(size, 1)):
        joined[own] = white
    torch.testing.assert_close(joined @ joined.T, alone @ alone.T, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- k-means


def test_the_result_is_as_good_as_scikit_learns():
    for seed in range(3):
        x = rows(400, groups=40, seed=seed)
        labels, distance = cluster(x, 20, max_iterations=100)
        centres = torch.stack([x[labels == k].mean(0) for k in range(20)])
        assert torch.equal(torch.cdist(x, centres).argmin(1), labels), "a fixed point of Lloyd's iteration"
        assert distance == pytest.approx(float((x - centres[labels]).square().sum()), rel=1e-12)
        theirs = KMeans(20, n_init=5, max_iter=100, random_state=0).fit(x.numpy()).inertia_
        assert distance < 1.03 * theirs


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_number_of_ranks_finds_the_same_clusters(size, interleaved):
    x = rows(101, groups=30, spread=1.0)
    alone, expected = cluster(x, 12)

    def part(world):
        own = own_rows(world, x, interleaved)
        return own, cluster(x[own], 12, world=world, positions=own, count=len(x))

    for own, (labels, distance) in thread_world.run(part, Grid(size, 1)):
        assert torch.equal(labels, alone[own])
        assert distance == pytest.approx(expected, rel=1e-12)


def test_the_key_decides():
    x = rows(200, groups=1, spread=1.0)
    labels = [cluster(x, 10, hash64(seed), num_starts=1)[0] for seed in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_the_best_start_counts():
    x = rows(200, groups=1, spread=1.0)
    singles = [
        kmeans._lloyd(of_one(x), kmeans._plus_plus(of_one(x), 10, hash64(KEY, start)), 30)[1] for start in range(5)
    ]
    assert cluster(x, 10)[1] == min(singles) < max(singles)


def test_of_starts_that_are_equal_up_to_rounding_the_first_counts(monkeypatch):
    """Rounding differs from one number of ranks to another, and labels have other numbers in every start."""
    starts = iter([("a", 1.0), ("b", 1 - 1e-12), ("c", 1 - 1e-6), ("d", 1 - 1e-6 - 1e-13), ("e", 1.0)])
    monkeypatch.setattr(kmeans, "_lloyd", lambda *_: next(starts))
    assert cluster(rows(9), 3) == ("c", 1 - 1e-6)


def of_one(x):
    return kmeans._Rows(x, torch.arange(len(x)), len(x), one_process(), "")


def test_centres_begin_far_apart():
    """k-means++ finds well separated groups without an iteration."""
    x = rows(240, groups=24, spread=1e-3)
    for seed in range(5):
        labels, _ = cluster(x, 24, hash64(seed), num_starts=1, max_iterations=0)
        assert len(labels.unique()) == 24


def test_an_empty_cluster_begins_anew_at_the_farthest_row():
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0]], dtype=torch.float64)
    labels, distance = kmeans._lloyd(of_one(x), torch.tensor([[1.0], [1e6], [2e6]], dtype=torch.float64), 30)
    assert len({*labels.tolist()}) == 3 and labels.tolist().count(int(labels[3])) == 1
    assert distance == pytest.approx(0.5)


def test_fewer_different_rows_than_clusters():
    x = rows(4, groups=4).repeat(5, 1)
    labels, distance = cluster(x, 7)
    assert distance == pytest.approx(0, abs=1e-9) and len({*labels.tolist()}) == 4
    assert torch.equal(labels.view(5, 4), labels[:4].expand(5, 4))
    labels, distance = cluster(x[:3], 7)
    assert distance == 0 and len({*labels.tolist()}) == 3


def test_the_phase_changes_with_every_centre_and_iteration():
    """A phase that changes counts as progress, however long the whole takes."""
    world, phases_and_bounds = one_process(), []
    reduce, world.all_reduce_sum = (
        world.all_reduce_sum,
        lambda x: phases_and_bounds.append((world.state.phase, world.state.bound)) or reduce(x),
    )
    cluster(rows(101, groups=30, spread=1.0), 12, world=world, num_starts=2)
    phases = [phase for phase, bound in phases_and_bounds if bound == kmeans.PASS_TIMEOUT_S]
    assert len({*phases}) > 2 * 12 and len(phases) >= len(phases_and_bounds) - 2, "all but the first centre of a start"
    assert sum("iteration" in phase for phase in phases) > 4 and world.state.phase == ""


def test_blocks_do_not_matter(monkeypatch):
    x = rows(101, groups=30, spread=1.0)
    labels, _ = cluster(x, 12)
    monkeypatch.setitem(kmeans.BLOCK_BYTES, "cpu", 7 * 12 * 8)
    assert torch.equal(cluster(x, 12)[0], labels)
