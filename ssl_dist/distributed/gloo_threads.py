"""How the threads of a process group are scheduled, on which the time of a small exchange between busy ranks hangs."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def unobtrusive() -> Iterator[None]:
    """A context in which the threads that this one starts take the processor from no running thread (SCHED_BATCH, see
    sched(7)); for the making of a gloo process group.

    gloo's network thread, woken by a message while another thread of the group still holds the lock of that pair, polls
    for the lock (gloo/transport/tcp/pair.cc, `Pair::handleEvents`). Where it has taken the holder's core, it does so to
    the end of its time slice, which is milliseconds. Nothing changes where the policy is not the usual one or may not
    be set.
    """
    if not hasattr(os, "sched_setscheduler") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    usual = os.sched_getparam(0)
    with contextlib.suppress(OSError):  # a sandbox may refuse it: exchanges are then as slow as gloo makes them
        os.sched_setscheduler(0, os.SCHED_BATCH, usual)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) == os.SCHED_BATCH:
            os.sched_setscheduler(0, os.SCHED_OTHER, usual)
