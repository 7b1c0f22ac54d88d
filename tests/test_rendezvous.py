"""The rendezvous of the ranks, with and without all of them, and the self-test after it."""

import os
import socket
import time

import pytest
import torch

from ssl_dist.distributed import rendezvous
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.rendezvous import StoppedWhileWaiting
from ssl_dist.distributed.world import World, join_world, self_test
from ssl_dist.errors import Fault, UserError
from ssl_dist.grid import Grid
from tests import ranks

CPU = torch.device("cpu")


def never():
    return False


@pytest.fixture
def port(monkeypatch):
    port = ranks.free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def join_as_two_of_three(rank, size):
    try:
        rendezvous.join(RankInfo(rank, 3, rank, 3), CPU, never, timeout=2)
    except Fault as fault:
        return str(fault)


def test_a_rank_that_does_not_come_is_named(tmp_path):
    for message in ranks.launch(join_as_two_of_three, 2, tmp_path):
        assert message.startswith("rank 2 of 3 did not come; here are rank 0 on ") and "rank 1 on " in message


def test_rank_0_that_does_not_come_is_named(port):
    with pytest.raises(Fault, match=rf"rank 0 does not answer at 127\.0\.0\.1:{port} .*did it start\?"):
        rendezvous.join(RankInfo(1, 2, 1, 2), CPU, never, timeout=0.3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_request_ends_the_wait(port, rank):
    start = time.monotonic()
    with pytest.raises(StoppedWhileWaiting):
        rendezvous.join(RankInfo(rank, 2, rank, 2), CPU, lambda: time.monotonic() > start + 0.3)
    assert time.monotonic() - start < 5


def test_a_port_that_is_in_use_is_a_users_mistake(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(UserError, match=f"MASTER_PORT = {port} is in use"):
            rendezvous.join(RankInfo(0, 2, 0, 2), CPU, never, timeout=1)


@pytest.mark.parametrize("value", [None, "one"])
def test_an_environment_without_a_port(monkeypatch, value):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    if value:
        monkeypatch.setenv("MASTER_PORT", value)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT"):
        rendezvous.join(RankInfo(0, 2, 0, 2), CPU, never)


def proven(rank, size, broken):
    world = World(RankInfo(rank, size, rank, size), Grid(size // 2, 2), CPU)
    if broken == "no backward sum":
        reduce = World.all_reduce_sum
        # the backward of a gather asks for the sum of a gradient; that of the forward is left as it is
        World.all_reduce_sum = lambda self, x: x if x.dim() == 3 else reduce(self, x)
    if broken == "wrong order":
        world.grid = Grid(2, size // 2) if size > 2 else Grid(2, 1)
        gather = World._gather
        World._gather = lambda self, x: gather(self, x).flip(0)
    if broken == "wrong sum":
        reduce = World.all_reduce_sum
        World.all_reduce_sum = lambda self, x: reduce(self, x) * (2 if x.dim() == 0 else 1)
    start = time.perf_counter()
    try:
        self_test(world)
    except Fault as fault:
        return str(fault)
    return time.perf_counter() - start


@pytest.mark.parametrize("size", [2, 4])
def test_self_test_passes_where_all_is_well(tmp_path, size):
    seconds = ranks.run(proven, size, tmp_path, None)
    print(f"self-test on {size} ranks: {1000 * max(seconds):.1f} ms")


@pytest.mark.parametrize(
    ("broken", "message"),
    [("no backward sum", "not summed"), ("wrong order", "not in canonical order"), ("wrong sum", "a sum over the")],
)
def test_self_test_finds_what_is_broken(tmp_path, broken, message):
    assert all(message in answer for answer in ranks.run(proven, 2, tmp_path, broken))


def start(rank, size):
    world = join_world(RankInfo.from_environment(), Grid(1, 2))
    try:
        return world.all_gather_object(os.environ["RANK"]), world.rank_info.world_size
    finally:
        world.close()


def test_start_by_a_launchers_environment(tmp_path):
    assert ranks.launch(start, 2, tmp_path) == [(["0", "1"], 2)] * 2
