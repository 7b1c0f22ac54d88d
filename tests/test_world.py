"""The gradient rule, in real processes: gathered losses and synchronised BatchNorm give one process's gradients."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist import cli
from ssl_dist.distributed.world import RankInfo, World, one_process, ranks_here, self_test
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from tests import ranks, thread_world

K, M, D = 4, 6, 5


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, D), nn.BatchNorm1d(D)
    ).double()


def make_images():
    return torch.randn(K, M, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(z_KMD):
    """Couples every row with every other and depends on the order of views and images."""
    z = z_KMD.flatten(0, 1)
    weights = torch.arange(1.0, len(z) + 1, dtype=z.dtype)
    return ((z @ z.T) * weights[:, None] * weights.sqrt()).tanh().mean()


def one_process_result():
    net, images = make_net(), make_images()
    z = net(images.flatten(0, 1)).unflatten(0, (K, M))
    loss = loss_of(z)
    loss.backward()
    return (
        loss.item(),
        [p.grad.numpy() for p in net.parameters()],
        [b.numpy() for b in net.buffers()],
        z.detach().numpy(),
    )


def step(rank, size, views, share):
    world = World(RankInfo(rank, size, rank, size), Grid(size // views, views), torch.device("cpu"))
    net = world.wrap(world.synchronize_batchnorm(make_net()))
    grid, images = world.grid, make_images()
    own_views, own_images = grid.view_range(rank, K), grid.image_range(rank, M)
    mine = images[own_views.start : own_views.stop, own_images.start : own_images.stop]
    z = world.gather_views(net(mine.flatten(0, 1)).unflatten(0, mine.shape[:2]))
    if share:
        low, high = world.share(K * M)
        rows = z.flatten(0, 1)
        loss = world.scale_for_ddp_mean((rows[low:high] ** 3).sum())
    else:
        loss = loss_of(z)
    loss.backward()
    module = getattr(net, "module", net)
    mean = world.all_reduce_mean(loss.detach()).item()
    labels = world.gather_images(torch.arange(M)[own_images.start : own_images.stop])
    return (
        mean, [p.grad.numpy() for p in module.parameters()], [b.numpy() for b in module.buffers()], z.detach().numpy(),
        labels.tolist(),
    )  # fmt: skip


@pytest.mark.parametrize(("size", "views"), [(2, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_loss_on_gathered_views_equals_one_process(tmp_path, size, views):
    loss, gradients, buffers, z = one_process_result()
    for mean, grads, bufs, z_KMD, labels in ranks.run(step, size, tmp_path, views, False):
        assert mean == pytest.approx(loss, rel=1e-12)
        np.testing.assert_allclose(z_KMD, z, rtol=1e-10, atol=1e-12)
        assert labels == list(range(M))
        for ours, theirs in zip(grads, gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(bufs, buffers, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_shares_of_a_loss_equal_one_process(tmp_path):
    net, images = make_net(), make_images()
    loss = (net(images.flatten(0, 1)) ** 3).sum()
    loss.backward()
    for mean, grads, *_ in ranks.run(step, 2, tmp_path, 2, True):
        assert mean == pytest.approx(loss.item(), rel=1e-12)
        for ours, theirs in zip(grads, net.parameters(), strict=True):
            np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-9, atol=1e-11)


def sums(rank, size):
    world = World(RankInfo(rank, size, rank, size), Grid(size, 1), torch.device("cpu"))
    x = torch.tensor([1.0 + rank], requires_grad=True)
    total = world.all_reduce_sum_with_grad(x)
    (total * (rank + 2)).backward()
    reduced = world.all_reduce_sum(torch.tensor([3.0]))
    flags = world.any_rank(rank == 1, False)()
    shares = world.share(7)
    failed = None
    try:
        world.on_rank0(lambda: (_ for _ in ()).throw(UserError("no")))
    except UserError as error:
        failed = str(error)
    return total.item(), x.grad.item(), reduced.item(), flags, shares, world.on_rank0(lambda: rank), failed


def test_collectives(tmp_path):
    answers = ranks.run(sums, 2, tmp_path)
    assert [a[:4] for a in answers] == [(3.0, 5.0, 6.0, [True, False])] * 2
    assert [a[4] for a in answers] == [(0, 3), (3, 7)]
    assert [a[5:] for a in answers] == [(0, "no")] * 2


@pytest.mark.parametrize("count", [0, 1, 5, 16, 17])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_evenly(count, size):
    worlds = [World(RankInfo(r, size, r, size), Grid(size, 1), torch.device("cpu")) for r in range(size)]
    bounds = [world.share(count) for world in worlds]
    assert bounds[0][0] == 0 and bounds[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1


def test_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert RankInfo.from_environment() == RankInfo()
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert RankInfo.from_environment() == RankInfo(1, 4, 1, 2)


IMPOSSIBLE = {  # and words of the line
    ("", "", "1", ""): ["LOCAL_RANK = '1'", "RANK is not"],
    ("1", "", "", ""): ["RANK = '1'", "WORLD_SIZE is not"],
    ("", "4", "", ""): ["WORLD_SIZE = '4'", "RANK is not"],
    ("0", "2", "0", ""): ["LOCAL_WORLD_SIZE is not"],
    ("2", "2", "0", "1"): ["RANK = 2", "WORLD_SIZE = 2"],
    ("-1", "2", "0", "1"): ["RANK = '-1'", "not a number"],
    ("one", "2", "0", "1"): ["RANK = 'one'", "not a number"],
    ("²", "2", "0", "1"): ["RANK = '²'", "not a number"],
    ("1" * 5000, "2", "0", "1"): ["RANK = '111", "not a number"],
    ("0", "0", "0", "1"): ["WORLD_SIZE = 0"],
    ("3", "4", "2", "2"): ["LOCAL_RANK = 2", "LOCAL_WORLD_SIZE = 2"],
    ("0", "4", "1", "2"): ["LOCAL_RANK = 1 of 2", "RANK = 0 of 4"],
    ("0", "2", "0", "4"): ["LOCAL_RANK = 0 of 4", "RANK = 0 of 2"],
}


@pytest.mark.parametrize("values", IMPOSSIBLE, ids=lambda values: "-".join(values)[:20])
def test_an_environment_that_no_rank_can_have_is_refused_and_the_remedy_helps(values, monkeypatch, capsys, tmp_path):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    config = ["configs/digits/relational-conv4.yaml", f"run_dir={tmp_path / 'run'}"]
    commands = [["train", *config], ["extract", tmp_path], ["evaluate", tmp_path, "knn"]]
    for command in commands:
        assert cli.main(list(map(str, command))) == 2
        [line] = capsys.readouterr().err.splitlines()
        if command[0] == "train":
            assert line.startswith("error: environment: ") and all(word in line for word in IMPOSSIBLE[values])
            remedy = line.rpartition("unset ")[2].split()
    assert cli.main(["explain", "nowhere.yaml"]) == 2 and "nowhere.yaml" in capsys.readouterr().err, "nobody spoke"
    for name in remedy:
        monkeypatch.delenv(name)
    assert RankInfo.from_environment() == RankInfo()


def test_one_process_needs_no_group():
    world = one_process()
    z = torch.randn(2, 3, 4)
    assert world.gather_views(z) is z and world.all_reduce_sum_with_grad(z) is z and world.any_rank(True)() == [True]


class SharedSums(thread_world.ThreadWorld):
    """Rank 0 adds up for all: else a thousand ranks make a million sums."""

    def _all_gather(self, x):
        return self.all_gather_object(x.detach())

    def all_reduce_sum(self, x):
        parts = self._all_gather(x)
        return self.all_gather_object(torch.stack(parts).sum(0) if self.is_rank0 else None)[0]


def test_the_self_test_on_a_thousand_ranks(monkeypatch):
    """Sums of whole numbers that float32 cannot hold: it found false faults from 192 ranks on."""
    monkeypatch.setattr(thread_world, "ThreadWorld", SharedSums)
    thread_world.run(self_test, Grid(64, 16))


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_ranks_of_a_machine(gpus, ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks_here(2) == ranks
