"""Rendezvous of the ranks of a run. Names torch.distributed, as world.py does.

Every wait is a loop in Python, so that signals are handled during it: torch waits in C++, which delays them by minutes.
"""

import itertools
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from ssl_dist.distributed import cores, gloo_threads
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import Fault, UserError

RENDEZVOUS_TIMEOUT_S = 300.0  # for all ranks to start; a cold file system takes minutes to import torch
# Of torch's own collectives: longer than any phase of a run, as it is the watchdog that ends ranks which hang.
COLLECTIVE_TIMEOUT = timedelta(days=7)
# Of this process, which may join one world after another: the store stays, for the others may be there first.
_joins = itertools.count()
_stores: dict[tuple[int, str, int], dist.Store] = {}
_STOPPING = "stopping"  # key: a rank was asked to stop before all had started
_TIMED_OUT = "giving-up"  # key: the error message of the rank whose timeout has passed first


class StoppedWhileWaiting(Exception):
    """A stop was requested before all ranks had started: there is nothing to save."""


def join(
    rank_info: RankInfo, device: torch.device, is_stopping: Callable[[], bool], timeout: float = RENDEZVOUS_TIMEOUT_S
) -> None:
    """Wait for the other ranks and form the process group.

    Raises `Fault` naming the ranks that have not started within `timeout` seconds, `UserError` when the port of rank 0
    is taken, `StoppedWhileWaiting` as soon as `is_stopping()`.
    """
    end = time.monotonic() + timeout
    # A store that survives a restart by torchrun still has the keys of dead ranks; and every rank joins as often.
    prefix = f"ssl_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_joins)}"
    store = dist.PrefixStore(prefix, _store(rank_info, end, is_stopping))
    store.set(f"cores/{rank_info.rank}", cores.given())
    store.set(f"here/{rank_info.rank}", f"{rank_info} (pid {os.getpid()})")
    wait_for_all_ranks(store, rank_info, end, is_stopping)
    if device.type == "cpu":
        cores.bind(rank_info, lambda rank: store.get(f"cores/{rank}").decode())
    # Objects and barriers go by gloo, also beside GPUs: NCCL would spin on the GPU while rank 0 saves, and does not
    # notice that a peer has died. (With a `device_id` torch would send barriers to NCCL.)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # the watchdog has the only clock
    with gloo_threads.unobtrusive():
        dist.init_process_group(
            backend, store=store, rank=rank_info.rank, world_size=rank_info.world_size, timeout=COLLECTIVE_TIMEOUT
        )


def _store(rank_info: RankInfo, end: float, is_stopping: Callable[[], bool]) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT, kept by rank 0 unless torchrun's agent keeps it."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not 0 <= port < 2**16:
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(
            "environment: RANK is set but MASTER_ADDR and MASTER_PORT (a number below 65536) are not; start with "
            "torchrun"
        ) from None
    if (os.getpid(), host, port) in _stores:
        return _stores[os.getpid(), host, port]
    is_server = rank_info.is_rank0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_server:
        _wait_for_port(host, port, end, is_stopping)
    try:
        store = dist.TCPStore(host, port, None, is_server, timedelta(seconds=30), wait_for_workers=False)
    except dist.DistNetworkError as error:
        if not is_server or "EADDRINUSE" not in str(error):
            raise
        raise UserError(f"environment: MASTER_PORT = {port} is in use on {host}; choose another port") from None
    _stores[os.getpid(), host, port] = store
    return store


def _wait_for_port(host: str, port: int, end: float, is_stopping: Callable[[], bool]) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            cause = error
        if is_stopping():
            raise StoppedWhileWaiting
        time.sleep(0.1)
        if time.monotonic() > end:
            raise Fault(f"rank 0 does not answer at {host}:{port} ({cause}): did it start?")


def wait_for_all_ranks(store: dist.Store, rank_info: RankInfo, end: float, is_stopping: Callable[[], bool]) -> None:
    """Wait until `here/N` is set for every rank N. Raises what `join` raises, on all ranks that wait."""
    keys = [f"here/{rank}" for rank in range(rank_info.world_size)]
    try:
        while not store.check(keys):
            if is_stopping():
                store.set(_STOPPING, "")
            elif time.monotonic() > end:
                absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
                here = [store.get(key).decode() for rank, key in enumerate(keys) if rank not in absent]
                ranks = f"rank{'' if len(absent) == 1 else 's'} {', '.join(map(str, absent))}"
                message = f"{ranks} of {rank_info.world_size} did not come; here are {', '.join(here[:8])}"
                store.set(_TIMED_OUT, message)
            if store.check([_STOPPING]) or store.check([_TIMED_OUT]):
                error = StoppedWhileWaiting() if store.check([_STOPPING]) else Fault(store.get(_TIMED_OUT).decode())
                if rank_info.is_rank0:
                    time.sleep(1)  # the store ends with rank 0, and the others have to read it
                raise error
            time.sleep(0.02)
    except dist.DistNetworkError:
        raise Fault(f"{rank_info}: rank 0 has left while other ranks were still coming") from None
