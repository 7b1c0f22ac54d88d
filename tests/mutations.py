"""Ways to break the program that the equality certificate must see. Each is called first in every rank (`prepare`).

One process is left alone by all of them: it is what the ranks are compared with.
"""

from unittest import mock

from ssl_dist import methods
from ssl_dist.data.loader import TrainLoader
from ssl_dist.distributed import world as world_module
from ssl_dist.distributed.world import World


def lose_the_backward_sum():
    """A rank's representations get the gradient of its own share of the loss only."""
    backward = world_module._GatherViews.backward

    def lost(ctx, grad):
        with mock.patch.object(World, "all_reduce_sum", lambda self, x: x):
            return backward(ctx, grad)

    world_module._GatherViews.backward = staticmethod(lost)
    world_module.self_test = lambda world: None  # the self-test of every start sees it too; here the certificate must


def shift_a_share():
    """The last rank's share of the work begins and ends one piece too early."""
    share = World.share

    def shifted(self, count):
        shift = int(not self.alone and self.rank_info.rank == self.rank_info.world_size - 1)
        return tuple(bound - shift for bound in share(self, count))

    World.share = shifted


def normalize_locally():
    """BatchNorm over the images of a rank."""
    World.synchronize_batchnorm = lambda self, module: module


def reuse_a_view_id():
    """Behind the first view shard the last view is made like the first one."""
    init = TrainLoader.__init__

    def reusing(self, *arguments):
        init(self, *arguments)
        if self.grid.view_shard(self.rank) > 0:
            for ids, spec in zip(self.view_ids, self.specs, strict=True):
                ids[-1] = spec.first_view

    TrainLoader.__init__ = reusing


def add_methods(folder):
    """The methods of another folder, as if they lay in ssl_dist/methods."""
    methods.__path__.append(str(folder))
