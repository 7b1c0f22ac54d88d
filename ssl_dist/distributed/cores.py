"""Cores of their own for the ranks of a machine whose launcher gives them none."""

import os
import socket
from collections.abc import Callable

from ssl_dist.distributed.rank import GIVEN_CORES, RankInfo


def given() -> str:
    """This machine and the cores that this rank was started with."""
    return f"{socket.gethostname()}: {GIVEN_CORES}"


def bind(rank_info: RankInfo, given_to: Callable[[int], str]) -> None:
    """Keep this thread, and those that it starts from now on, on this rank's even part of the cores. given_to: what
    `given` returns on a rank.

    A rank on a CPU waits for the others at every layer that they exchange something in. Meanwhile the kernel finds
    other work for its core, and the rank wakes up on one whose caches hold nothing of it. Nothing is done where a
    launcher has given the ranks of this machine different cores, or where the cores cannot be divided evenly.
    """
    size = rank_info.local_world_size
    if not hasattr(os, "sched_setaffinity") or size == 1 or len(GIVEN_CORES) % size:
        return
    first = rank_info.rank - rank_info.local_rank
    if any(given_to(rank) != given() for rank in range(first, first + size)):
        return
    part = len(GIVEN_CORES) // size
    os.sched_setaffinity(0, GIVEN_CORES[part * rank_info.local_rank :][:part])
