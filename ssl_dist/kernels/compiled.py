"""How loops that add up are compiled, and how they run on as many threads as torch uses."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from numba import njit

# Sums may be reordered, which is what vectorises them. NaN and infinity keep their meaning: a run that diverges shows.
njit_sums = partial(njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def run_parallel(kernel: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `kernel(first, last, *arguments)` over ranges first..last-1 that together are 0..count-1, one a thread.

    The kernel releases the GIL, and its ranges write to different places.
    """
    num_threads = min(torch.get_num_threads(), count)
    if num_threads <= 1:
        kernel(0, count, *arguments)
        return
    bounds = [t * count // num_threads for t in range(num_threads + 1)]
    submit = _pool(torch.get_num_threads()).submit
    futures = [submit(kernel, *span, *arguments) for span in pairwise(bounds)]
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="kernel")
