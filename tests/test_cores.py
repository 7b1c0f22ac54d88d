"""Cores and scheduling of ranks on a CPU: distributed/cores.py and gloo_threads.py."""

import os
import socket
from pathlib import Path

import pytest
from torch import nn

from ssl_dist.distributed import cores, gloo_threads
from ssl_dist.distributed.rank import GIVEN_CORES, RankInfo, available_cores
from ssl_dist.distributed.world import join_world
from ssl_dist.grid import Grid
from tests import ranks


def bound(monkeypatch, given, size, *, first=0, of_others=None):
    """The cores that each of `size` ranks of one machine, from rank `first` on, binds itself to; None: to none.
    of_others: what the others announce."""
    monkeypatch.setattr(cores, "GIVEN_CORES", given)
    chosen = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, of_rank: chosen.append((pid, of_rank)))
    announced = {first + local: cores.given() for local in range(size)}
    if of_others is not None:
        announced[first + size - 1] = of_others
    for local in range(size):
        before = len(chosen)
        cores.bind(RankInfo(first + local, first + size, local, size), announced.__getitem__)
        if len(chosen) == before:
            chosen.append((0, None))
    assert all(pid == 0 for pid, _ in chosen), "this thread"
    return [of_rank for _, of_rank in chosen]


@pytest.mark.parametrize("first", [0, 6])
def test_ranks_divide_the_cores_of_their_machine(monkeypatch, first):
    assert bound(monkeypatch, [2, 3, 5, 7], 2, first=first) == [[2, 3], [5, 7]]
    assert bound(monkeypatch, [2, 3, 5, 7], 4, first=first) == [[2], [3], [5], [7]]


@pytest.mark.parametrize(("given", "size"), [([0, 1, 2, 3], 1), ([0, 1, 2], 2), ([0, 1], 3), ([0, 1], 4)])
def test_cores_that_cannot_be_divided_evenly_stay_together(monkeypatch, given, size):
    assert bound(monkeypatch, given, size) == [None] * size


def test_cores_that_a_launcher_has_divided_stay_as_they_are(monkeypatch):
    of_others = f"{socket.gethostname()}: [4, 5, 6, 7]"
    assert bound(monkeypatch, [0, 1, 2, 3], 2, of_others=of_others) == [None, None]
    assert bound(monkeypatch, [0, 1, 2, 3], 2, of_others="elsewhere: [0, 1, 2, 3]") == [None, None]


def policies():
    """The name and the scheduling policy of every thread of this process."""
    threads = Path("/proc/self/task").iterdir()
    return [((thread / "comm").read_text().strip(), os.sched_getscheduler(int(thread.name))) for thread in threads]


def joined(rank, size, views):
    world = join_world(RankInfo.from_environment(), Grid(size // views, views))
    try:
        world.view_columns(nn.Sequential())  # forms groups besides where the views are spread
        assert os.sched_getscheduler(0) == os.SCHED_OTHER, "this thread is as before"
        return policies(), os.sched_getaffinity(0), available_cores()
    finally:
        world.close()


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="Linux alone has these policies")
@pytest.mark.parametrize("views", [1, 2])
def test_threads_of_process_groups_take_the_core_from_no_other(tmp_path, views):
    for threads, _, _ in ranks.launch(joined, 2 * views, tmp_path, views):
        named = {policy for name, policy in threads if "gloo" in name}
        assert named == {os.SCHED_BATCH}, threads
        # Of every group one for the network and two for its work, which may not have their names yet.
        assert [policy for _, policy in threads].count(os.SCHED_BATCH) >= 3 * views, threads


def test_ranks_of_a_launcher_have_cores_of_their_own(tmp_path):
    size = 2
    answers = ranks.launch(joined, size, tmp_path, 1)
    expected = [set(GIVEN_CORES)] * size
    if len(GIVEN_CORES) % size == 0:
        half = len(GIVEN_CORES) // size
        expected = [set(GIVEN_CORES[:half]), set(GIVEN_CORES[half:])]
    assert [of_rank for _, of_rank, _ in answers] == expected
    assert [count for _, _, count in answers] == [len(GIVEN_CORES)] * size, "what a rank's share is counted from"


def test_a_policy_that_is_not_the_usual_one_stays(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_IDLE)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *arguments: calls.append(arguments))
    with gloo_threads.unobtrusive():
        pass
    assert not calls


def test_where_the_policy_may_not_be_set_nothing_changes(monkeypatch):
    def refuse(*_):
        raise PermissionError("not in this sandbox")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with gloo_threads.unobtrusive():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_the_usual_policy_is_back_after_an_error():
    with pytest.raises(RuntimeError, match="planned"), gloo_threads.unobtrusive():
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        raise RuntimeError("planned")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
