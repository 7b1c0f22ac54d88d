"""A team of threads: even parts, all of them done before anything is returned or raised."""

import threading
import time

import pytest

from ssl_dist.thread_team import ThreadTeam


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 24])
def test_every_item_is_worked_on_once(size, count):
    before, parts = threading.active_count(), []
    with ThreadTeam(size) as team:
        team.run(lambda low, high: parts.append((low, high)), count)
        assert threading.active_count() - before <= size - 1
    items = sorted(item for low, high in parts for item in range(low, high))
    assert items == list(range(count)) and len(parts) <= size
    assert max((high - low for low, high in parts), default=0) <= -(-count // size)
    assert threading.active_count() == before


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_an_error_waits_for_the_others(bad):
    done = []

    def work(low, high):
        if low <= bad < high:
            raise OSError(f"item {bad}")
        time.sleep(0.05)
        done.append(low)

    with ThreadTeam(3) as team:
        for _ in range(2):
            with pytest.raises(OSError, match=f"item {bad}"):
                team.run(work, 6)
            assert sorted(done) == [low for low in (0, 2, 4) if not low <= bad < low + 2]
            done.clear()
