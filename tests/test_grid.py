import itertools
import re

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
    cells = [pair for r in range(g.size) for pair in itertools.product(g.view_range(r, K), g.image_range(r, M))]
    assert sorted(cells) == list(itertools.product(range(K), range(M)))


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


def test_a_refusal_offers_no_split_that_is_refused():
    with pytest.raises(UserError, match="no split does; world sizes that do: 1, 2, 4"):
        grid.choose(2, 3, 3, 64, [6], False, "simclr")


# ------------------------------------------------------------------------------------- every factorisation

GROUPS = st.lists(st.integers(1, 24), min_size=1, max_size=3)
SMALL = {"world": st.integers(1, 24), "batch": st.integers(1, 48), "groups": GROUPS, "free": st.booleans()}


def dividing_shards(world, batch, groups, free):
    """The view shards that divide, by trying each."""
    return [
        wv
        for wv in range(1, world + 1)
        if world % wv == 0 and batch % (world // wv) == 0 and all(num % wv == 0 for num in groups) and (free or wv == 1)
    ]


def offered(error):
    """The view shards that a refusal lists."""
    text = str(error.value)
    assert "\n" not in text
    if "set data.view_shards=1 or auto" in text:
        return [1]
    if "no split does" in text:
        return []
    return [int(shards) for shards in re.findall(r"(\d+) \(\d+ image x \d+ view shards\)", text)]


@given(**SMALL)
def test_splits_are_all_that_divide(world, batch, groups, free):
    splits = grid.splits(world, batch, groups, free)
    assert [g.views for g in splits] == dividing_shards(world, batch, groups, free)
    assert all(g.size == world for g in splits)


@given(**SMALL)
@settings(max_examples=200)
def test_every_split_shares_every_group_evenly(world, batch, groups, free):
    """Each rank holds as many cells (group, view, image) as any other, and together they hold each cell once."""
    for g in grid.splits(world, batch, groups, free):
        cells = [
            [
                (group, view, image)
                for group, num in enumerate(groups)
                for view in g.view_range(rank, num)
                for image in g.image_range(rank, batch)
            ]
            for rank in range(world)
        ]
        assert {len(of_rank) for of_rank in cells} == {sum(groups) * batch // world}
        everything = [(k, v, m) for k, num in enumerate(groups) for v in range(num) for m in range(batch)]
        assert sorted(itertools.chain(*cells)) == everything


@given(**SMALL)
def test_every_split_can_be_asked_for_and_nothing_else(world, batch, groups, free):
    possible = dividing_shards(world, batch, groups, free)
    for view_shards in range(1, world + 2):
        if view_shards in possible:
            chosen = grid.choose(view_shards, world, world, batch, groups, free)
            assert chosen == Grid(world // view_shards, view_shards)
        else:
            with pytest.raises(UserError) as refused:
                grid.choose(view_shards, world, world, batch, groups, free)
            assert offered(refused) == possible


@given(**SMALL)
def test_without_a_split_the_world_sizes_that_have_one_are_listed(world, batch, groups, free):
    if dividing_shards(world, batch, groups, free):
        return
    with pytest.raises(UserError) as refused:
        grid.choose("auto", world, world, batch, groups, free)
    listed = [int(size) for size in str(refused.value).rpartition("that do: ")[2].split(", ")]
    assert listed == [size for size in range(1, 2 * world) if dividing_shards(size, batch, groups, free)]


@given(nodes=st.integers(1, 6), per_node=st.integers(1, 8), batch=st.integers(1, 96), groups=GROUPS, free=st.booleans())
@settings(max_examples=300)
def test_auto_spreads_an_image_over_nodes_only_when_it_must(nodes, per_node, batch, groups, free):
    world = nodes * per_node

    def crosses(views):
        """Some ranks that hold the same images lie on different nodes."""
        g = Grid(world // views, views)
        return len({(g.image_shard(rank), rank // per_node) for rank in range(world)}) > g.images

    possible = dividing_shards(world, batch, groups, free)
    inside = [views for views in possible if not crosses(views)]
    assert inside == [views for views in possible if Grid(world // views, views).inside(per_node)]
    if possible:
        assert grid.choose("auto", world, per_node, batch, groups, free).views == max(inside or possible)
