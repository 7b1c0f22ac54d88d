import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_dist import grid
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_every_image_and_view_is_held_exactly_once(wi, wv, images_each, views_each):
    g = Grid(wi, wv)
    M, K = wi * images_each, wv * views_each
    held = [pair for r in range(g.size) for pair in itertools.product(g.view_range(r, K), g.image_range(r, M))]
    assert sorted(held) == list(itertools.product(range(K), range(M)))


def test_ranks_that_share_images_are_neighbours():
    g = Grid(2, 4)
    assert [g.image_shard(r) for r in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("world", "per_node", "batch", "groups", "free", "expected"),
    [
        (1, 1, 64, [32], True, Grid(1, 1)),
        (4, 4, 64, [32], True, Grid(1, 4)),
        (8, 4, 64, [32], True, Grid(2, 4)),  # views stay inside a node
        (4, 4, 64, [6], True, Grid(2, 2)),
        (4, 4, 64, [2, 4], True, Grid(2, 2)),  # every group divides
        (4, 4, 64, [2], False, Grid(4, 1)),
        (3, 3, 64, [6], True, Grid(1, 3)),
        (6, 2, 6, [4], True, Grid(3, 2)),
    ],
)
def test_auto(world, per_node, batch, groups, free, expected):
    assert grid.choose("auto", world, per_node, batch, groups, free) == expected


def test_given_split_is_taken():
    assert grid.choose(2, 4, 4, 64, [32], True) == Grid(2, 2)


def test_refusals_list_what_works():
    with pytest.raises(UserError, match=r"1 \(4 image x 1 view shards\), 2 \(2 image x 2"):
        grid.choose(4, 4, 4, 64, [6], True)
    with pytest.raises(UserError, match="world sizes that do: 1, 2, 4"):
        grid.choose("auto", 3, 3, 64, [4], True)
    with pytest.raises(UserError, match=r"simclr needs every view.*data\.view_shards=1"):
        grid.choose(2, 4, 4, 64, [2], False, "simclr")
