"""Threads that share the images of a batch, to decode them and to make their views; and threads that work ahead."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


class ThreadTeam:
    """`size` threads, of which the caller is one, so that a team of one has no thread of its own. A context manager."""

    def __init__(self, size: int):
        assert size >= 1
        self.size = size
        self._helpers = ThreadPoolExecutor(size - 1, "team") if size > 1 else None

    def __enter__(self) -> "ThreadTeam":
        return self

    def __exit__(self, *_: object) -> None:
        if self._helpers is not None:
            self._helpers.shutdown()

    def run(self, work: Callable[[int, int], None], count: int) -> None:
        """Call work(low, high) with even parts of range(count), side by side. All have ended when this returns or
        raises the error of one of them: nothing still writes into a batch that is given up."""
        if self._helpers is None:
            return work(0, count)
        edges = [count * part // self.size for part in range(self.size + 1)]
        first, *rest = list(pairwise(edges))
        futures: list[Future[None]] = [self._helpers.submit(work, low, high) for low, high in rest if low < high]
        try:
            if first[0] < first[1]:
                work(*first)
        finally:
            wait(futures)
        for future in futures:
            future.result()


ALONE = ThreadTeam(1)


def run_ahead(calls: Iterable[Callable[[], T]], num_threads: int, ahead: int) -> Generator[T, None, None]:
    """The results of the calls, in order; up to `ahead` of them are computed before they are requested.

    A call's error is raised where its result would stand. When the generator ends or is closed, so have the threads;
    calls that have not begun are dropped.
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(num_threads, "ahead") as pool:
        try:
            for call in calls:
                pending.append(pool.submit(call))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
