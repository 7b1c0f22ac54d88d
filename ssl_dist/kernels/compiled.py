"""How loops that add up are compiled, and how they run on as many threads as torch uses."""

import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from ssl_dist.numba_cache import njit
from ssl_dist.thread_team import ThreadTeam

# Sums may be reordered, which is what vectorises them. NaN and infinity keep their meaning: a run that diverges shows.
njit_sums = partial(njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def run_parallel(kernel: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `kernel(first, last, *arguments)` over ranges first..last-1 that together are 0..count-1, one a thread.

    The kernel releases the GIL, and its ranges write to different places.
    """
    _team(torch.get_num_threads()).run(lambda first, last: kernel(first, last, *arguments), count)


_team = lru_cache(maxsize=1)(ThreadTeam)
os.register_at_fork(after_in_child=_team.cache_clear)  # threads do not live on there: the next call would wait for them
