"""Rendezvous of the ranks of a run, and a self-test of their collectives. Names torch.distributed, as world.py does.

Every wait is a loop in Python, so that a signal is handled during it: torch waits in C++, for minutes without a signal.
"""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import Fault, UserError

RENDEZVOUS_TIMEOUT_S = 300.0  # in which all ranks must have started; a cold file system takes minutes to import torch
# Of torch's own waits: longer than any phase of a run, as it is the watchdog that ends ranks which hang.
NO_LIMIT = timedelta(days=7)
STOPPING = "stopping"  # key: a rank was asked to stop before all had started
GIVING_UP = "giving-up"  # key: the message of the rank that has waited too long


class StoppedWhileWaiting(Exception):
    """A stop was requested before all ranks had started. There is nothing to save."""


def join(
    rank_info: RankInfo, device: torch.device, is_stopping: Callable[[], bool], timeout: float = RENDEZVOUS_TIMEOUT_S
) -> None:
    """Wait for the other ranks and form the process group.

    Raises `Fault` naming the ranks that have not started within `timeout` seconds, `UserError` when the port of rank 0
    is taken, `StoppedWhileWaiting` as soon as `is_stopping()`.
    """
    end = time.monotonic() + timeout
    store = dist.PrefixStore(_prefix(), _store(rank_info, end, is_stopping))
    store.set(f"here/{rank_info.rank}", f"{rank_info} (pid {os.getpid()})")
    wait_for_all_ranks(store, rank_info, end, is_stopping)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank_info.rank, world_size=rank_info.world_size, timeout=NO_LIMIT
    )


def _prefix() -> str:
    """Keys of one start. A store that outlives a restart by torchrun still holds the addresses of dead ranks."""
    return f"ssl_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store(rank_info: RankInfo, end: float, is_stopping: Callable[[], bool]) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT, kept by rank 0 unless torchrun's agent keeps it."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            "environment: RANK is set but MASTER_ADDR and MASTER_PORT (a number) are not; start with torchrun"
        ) from None
    keeps = rank_info.is_rank0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        _await_port(host, port, end, is_stopping)
    try:
        return dist.TCPStore(host, port, None, keeps, timedelta(seconds=30), wait_for_workers=False)
    except dist.DistNetworkError as error:
        if not keeps or "EADDRINUSE" not in str(error):
            raise
        raise UserError(f"environment: MASTER_PORT = {port} is in use on {host}; choose another port") from None


def _await_port(host: str, port: int, end: float, is_stopping: Callable[[], bool]) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            fault = error
        if is_stopping():
            raise StoppedWhileWaiting
        time.sleep(0.1)
        if time.monotonic() > end:
            raise Fault(f"rank 0 does not answer at {host}:{port} ({fault}): did it start?")


def wait_for_all_ranks(store: dist.Store, rank_info: RankInfo, end: float, is_stopping: Callable[[], bool]) -> None:
    everyone = [f"here/{rank}" for rank in range(rank_info.world_size)]
    try:
        while not store.check(everyone):
            if is_stopping():
                store.set(STOPPING, "")
            elif time.monotonic() > end:
                absent = [rank for rank, key in enumerate(everyone) if not store.check([key])]
                here = [store.get(key).decode() for rank, key in enumerate(everyone) if rank not in absent]
                text = f"{_ranks(absent)} of {rank_info.world_size} did not come; here are {', '.join(here[:8])}"
                store.set(GIVING_UP, text)
            if store.check([STOPPING]):
                _let_others_read(rank_info)
                raise StoppedWhileWaiting
            if store.check([GIVING_UP]):
                text = store.get(GIVING_UP).decode()
                _let_others_read(rank_info)
                raise Fault(text)
            time.sleep(0.02)
    except dist.DistNetworkError:
        raise Fault(f"{rank_info}: rank 0 has left while other ranks were still coming") from None


def _let_others_read(rank_info: RankInfo) -> None:
    """The store ends with rank 0."""
    if rank_info.is_rank0:
        time.sleep(1)


def _ranks(numbers: list[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def self_test(world: Any) -> None:
    """A start-up self-test, some milliseconds: gathered values are in canonical order and gradients are summed.

    The cell (k, m) of the global batch holds its own number, and rank r's loss is r + 1 times the sum of squares; so
    the gradient of a cell must be 2 cell (1 + 2 + ... + W). Raises `Fault`: a library or network that computes wrong
    sums would train a wrong network without a word.
    """
    grid, rank, size = world.grid, world.rank_info.rank, world.rank_info.world_size
    num_views, num_images = 2 * grid.views, 3 * grid.images
    cells = torch.arange(1.0, num_views * num_images + 1, device=world.device).view(num_views, num_images, 1)
    views, images = grid.view_range(rank, num_views), grid.image_range(rank, num_images)
    own = cells[views.start : views.stop, images.start : images.stop].clone().requires_grad_()
    gathered = world.gather_views(own)
    if not torch.equal(gathered.detach(), cells):
        raise Fault(f"{world.rank_info}: self-test: gathered representations are not in canonical order")
    (gathered.square().sum() * (rank + 1)).backward()
    if not torch.equal(own.grad, own.detach() * size * (size + 1)):
        raise Fault(f"{world.rank_info}: self-test: gradients of gathered views are not summed over the ranks")
    total = world.all_reduce_sum_with_grad(own.sum())
    if total.item() != cells.sum() * 1.0:
        raise Fault(f"{world.rank_info}: self-test: a sum over the ranks is {total.item():g}, not {cells.sum():g}")
