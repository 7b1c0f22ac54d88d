"""Ways to break the program that the equality certificate must detect. Each is called first in every rank (`prepare`).

None of them changes what is right or wrong of a run of one process, which is the reference for the ranks.
"""

import os
from unittest import mock

import numpy as np

from ssl_dist import methods
from ssl_dist.data.loader import TrainLoader
from ssl_dist.distributed import world as world_module
from ssl_dist.distributed.world import World, one_process
from ssl_dist.keys import fold
from ssl_dist.methods import lejepa, mae


def lose_the_backward_sum():
    """A rank's representations get the gradient of its own share of the loss only."""
    backward = world_module._GatherViews.backward

    def backward_without_sum(ctx, grad):
        with mock.patch.object(World, "all_reduce_sum", lambda self, x: x):
            return backward(ctx, grad)

    world_module._GatherViews.backward = staticmethod(backward_without_sum)
    world_module.self_test = lambda world: None  # the self-test at start-up would detect it before the certificate


def shift_a_share():
    """The last rank's share of pieces begins and ends one piece too early."""
    share = World.share

    def shifted(self, count):
        shift = int(not self.alone and self.rank_info.rank == self.rank_info.world_size - 1)
        return tuple(bound - shift for bound in share(self, count))

    World.share = shifted


def normalize_locally():
    """BatchNorm over the images of a rank."""
    World.synchronize_batchnorm = lambda self, module: module


def reuse_a_view_id():
    """In every view shard but the first the last view is drawn with the id of the first one."""
    init = TrainLoader.__init__

    def reusing(self, *arguments):
        init(self, *arguments)
        if self.grid.view_shard(self.rank) > 0:
            for ids, spec in zip(self.view_ids, self.specs, strict=True):
                ids[-1] = spec.first_view

    TrainLoader.__init__ = reusing


def be_normal_locally():
    """LeJEPA's characteristic functions are means over the images of a rank's share."""
    regularized = lejepa.regularized

    def of_own_images(z_KMD, chosen, seed, step, options, world):
        lo, hi = world.share(z_KMD.shape[1])
        return regularized(z_KMD[:, lo:hi], chosen, seed, step, options, one_process())

    lejepa.regularized = of_own_images


def draw_slices_of_the_rank():
    """LeJEPA's slices are others on every rank."""
    drawn_slices = lejepa.drawn_slices

    def of_rank(seed, step, dim, lo, hi):
        return drawn_slices(seed + int(os.environ["RANK"]), step, dim, lo, hi)

    lejepa.drawn_slices = of_rank


def average_a_sum():
    """A share of a sum is not multiplied by the number of ranks, over which DDP averages: wrong by 1 / W."""
    World.scale_for_ddp_mean = lambda self, loss_share: loss_share


def add_methods(folder):
    """Find the methods in `folder` as if their files were in ssl_dist/methods."""
    methods.__path__.append(str(folder))


def mask_by_place_in_the_batch():
    """The patches that are hidden are drawn by an image's place among those of its rank."""
    seen = mae.seen_patches
    mae.seen_patches = lambda key, image_ids, *sizes: seen(key, np.arange(len(image_ids)), *sizes)


def mask_by_rank():
    """The patches that are hidden are drawn by the rank, too."""
    seen, rank = mae.seen_patches, int(os.environ["RANK"])
    mae.seen_patches = lambda key, *rest: seen(fold(key, rank) if rank else key, *rest)


def add_up_errors_of_a_rank():
    """The error is a sum over the patches of a rank, not a mean over them."""
    error = mae.hidden_error
    mae.hidden_error = lambda predicted, patches, hidden, *rest: error(predicted, patches, hidden, *rest) * hidden.sum()
