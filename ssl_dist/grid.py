"""The grid of ranks (a two-dimensional device mesh): W = Wi x Wv. Pure arithmetic, so that `explain` needs no ranks.

Rank r = i * Wv + v holds the image shard i and the view shard v: the Wv ranks that share images are neighbours, so
they lie on one node whenever Wv divides the ranks of a node.
"""

from dataclasses import dataclass

from ssl_dist.errors import UserError


@dataclass(frozen=True)
class Grid:
    """images (Wi) x views (Wv) ranks."""

    images: int
    views: int

    def __str__(self) -> str:
        return f"{self.images}x{self.views}"

    @property
    def size(self) -> int:
        return self.images * self.views

    def image_shard(self, rank: int) -> int:
        return rank // self.views

    def view_shard(self, rank: int) -> int:
        return rank % self.views

    def inside(self, ranks_per_node: int) -> bool:
        """Whether the ranks that share images always lie on one node."""
        return ranks_per_node % self.views == 0

    def image_range(self, rank: int, batch_size: int) -> range:
        """Positions of the global batch that `rank` holds."""
        count = batch_size // self.images
        start = self.image_shard(rank) * count
        return range(start, start + count)

    def view_range(self, rank: int, num_views: int) -> range:
        """Views of a group of `num_views` that `rank` holds."""
        count = num_views // self.views
        start = self.view_shard(rank) * count
        return range(start, start + count)


def splits(world_size: int, batch_size: int, group_sizes: list[int], free_views: bool) -> list[Grid]:
    """Every grid of `world_size` ranks that divides the batch and every group of views evenly."""
    grids = []
    for num_view_shards in range(1, world_size + 1 if free_views else 2):
        if world_size % num_view_shards:
            continue
        grid = Grid(world_size // num_view_shards, num_view_shards)
        if batch_size % grid.images == 0 and all(size % grid.views == 0 for size in group_sizes):
            grids.append(grid)
    return grids


def choose(
    view_shards: int | str,
    world_size: int,
    ranks_per_node: int,
    batch_size: int,
    group_sizes: list[int],
    free_views: bool,
    method: str = "",
) -> Grid:
    """The grid of a run. auto: as many view shards as divide the ranks of a node and the views; images take the rest.

    Raises `UserError` listing the grids that divide evenly when the requested one does not.
    """
    possible = splits(world_size, batch_size, group_sizes, free_views)
    if view_shards == "auto":
        inside = [grid for grid in possible if grid.inside(ranks_per_node)] or possible
        if inside:
            return inside[-1]
        request = f"{world_size} ranks"
    else:
        request = f"data.view_shards = {view_shards} on {world_size} ranks"
        for grid in possible:
            if grid.views == view_shards:
                return grid
        if possible and not free_views:
            raise UserError(
                f"data.view_shards = {view_shards}: method {method} needs every view of an image on one rank; "
                "set data.view_shards=1 or auto"
            )
    views = "+".join(map(str, group_sizes))
    text = f"{request} cannot share optim.batch_size = {batch_size} images and views = {views} evenly: "
    if possible:
        raise UserError(text + "data.view_shards can be " + ", ".join(f"{g.views} ({_shards(g)})" for g in possible))
    sizes = [w for w in range(1, 2 * world_size) if splits(w, batch_size, group_sizes, free_views)]
    raise UserError(text + f"no split does; world sizes that do: {', '.join(map(str, sizes))}")


def _shards(grid: Grid) -> str:
    return f"{grid.images} image x {grid.views} view shards"
