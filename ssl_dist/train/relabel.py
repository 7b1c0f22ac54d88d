"""A network's outputs for all training images, for methods that make labels of them (`SSLMethod.before_step`)."""

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist import views
from ssl_dist.data.loader import MakeView, view_batches
from ssl_dist.device import to_device
from ssl_dist.distributed.world import World
from ssl_dist.keys import DROPOUT, RELABEL, hash64, row_keys
from ssl_dist.methods.base import Rows
from ssl_dist.nn.layers import at_least_float32, keyed_rows
from ssl_dist.progress import Progress
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.run.encoder import BATCH_SIZE, BATCH_TIMEOUT_S, share_in_batches
from ssl_dist.run.folder import title

PHASE = "the outputs for new labels"


def outputs(
    plan: RunPlan,
    world: World,
    to_input: Callable[[Tensor], Tensor],
    step: int,
    network: nn.Module,
    augmented: bool = False,
    training: bool = False,
) -> Rows:
    """This rank's part of all training images through `network`, images [N, 3, S, S] -> [N, D], without gradient.

    augmented: a view by the first group's recipe, drawn from (seed, step, image), instead of the test transform.
    training: the network's training mode. Then the images pass in batches of optim.batch_size in the order of
    positions, each spread over all ranks, so that batch statistics are the same on any number of ranks; the tail joins
    the last batch. The mode is put back afterwards. `step`: steps completed, which the draws depend on.
    """
    order, count = plan.order, len(plan.order.train_ids)
    ranges = list(_in_training(world, count, order.batch_size) if training else _in_evaluation(world, count))
    positions = np.concatenate([np.arange(low, high) for low, high in ranges])
    ids_per_step = (order.train_ids[low:high] for low, high in ranges)
    mode, values, done = network.training, None, 0
    network.train(training)
    quiet = not world.is_rank0 or count < 20_000  # a few seconds' work needs no bar inside the training's
    with (
        world.state.phase_of(PHASE, BATCH_TIMEOUT_S),
        plan.open_reader() as reader,
        closing(view_batches(reader, ids_per_step, _view_maker(plan, step, augmented), plan.threads)) as batches,
        Progress(f"{title(plan.run)}: outputs of {count} images", len(positions), "image", quiet) as progress,
        torch.no_grad(),
    ):
        for images, ids in batches:
            keys = row_keys(hash64(order.seed, DROPOUT, RELABEL, step), np.zeros(1, np.int64), ids)
            with keyed_rows(to_device(keys.view(np.int64).ravel(), world.device)):
                output = at_least_float32(network(to_input(torch.from_numpy(images).to(world.device))))
            if values is None:
                values = output.new_empty(len(positions), *output.shape[1:])
            values[done : done + len(output)] = output
            done += len(output)
            world.state.phase = f"{PHASE}, of image {done}"  # another name: the time limit is that of a batch
            progress.update(len(output))
    network.train(mode)
    with world.state.phase_of(f"{PHASE}, of the other ranks", BATCH_TIMEOUT_S):
        world.barrier()  # one that reads from a slower disk may be far behind
    assert values is not None, "every rank has a batch, if an empty one"
    return Rows(torch.from_numpy(positions).to(world.device), values)


def _view_maker(plan: RunPlan, step: int, augmented: bool) -> MakeView:
    spec, data = plan.specs[0], plan.config.data
    if augmented:
        seed = int(hash64(plan.order.seed, RELABEL))
        return lambda images, team: views.make_views(images, spec, spec.view_ids[:1], seed, step, team)[0]
    # The short side before the centre crop, in the proportion of the evaluation's transform.
    resize = None if data.eval_resize is None else max(spec.size, data.eval_resize * spec.size // data.image_size)
    return lambda images, team: views.test_views(images, spec.size, resize, data.eval_interpolation, team)


def _in_evaluation(world: World, count: int) -> Iterator[tuple[int, int]]:
    low, high = share_in_batches(world, count)
    return ((start, min(start + BATCH_SIZE, high)) for start in range(low, max(high, low + 1), BATCH_SIZE))


def _in_training(world: World, count: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """This rank's even part of every batch."""
    assert world.grid.views == 1, "methods that relabel keep all views of an image on one rank"
    for start in range(0, count - batch_size + 1, batch_size):
        stop = start + batch_size if start + 2 * batch_size <= count else count
        low, high = world.share(stop - start)
        yield start + low, start + high
