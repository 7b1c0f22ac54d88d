"""A network's outputs for all training images, for methods that make labels of them (`SSLMethod.before_step`)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist import views
from ssl_dist.distributed.world import World
from ssl_dist.keys import DROPOUT, RELABEL, hash64, row_keys
from ssl_dist.methods.base import Rows, at_least_float32
from ssl_dist.nn.layers import keyed_rows
from ssl_dist.progress import Progress
from ssl_dist.run.blueprint import RunPlan

BATCH = 256  # images of a rank's pass in evaluation mode, where its size changes nothing
PHASE = "the outputs for new labels"
STUCK = 600.0  # seconds without a batch after which a rank ends


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
    order, spec, count = plan.order, plan.specs[0], len(plan.order.train_ids)
    ranges = list(_in_training(world, count, order.batch_size) if training else _in_evaluation(world, count))
    positions = np.concatenate([np.arange(low, high) for low, high in ranges])
    mode, values, done = network.training, None, 0
    network.train(training)
    title = f"outputs of {count} images"
    quiet = not world.is_rank0 or count < 20_000  # a few seconds' work needs no bar inside the training's
    with (
        world.state.phase_of(PHASE, STUCK),
        plan.open_reader() as reader,
        ThreadPoolExecutor(plan.threads, "view") as pool,
        Progress(title, len(positions), "image", quiet) as progress,
        torch.no_grad(),
    ):
        for pixels, heights, widths, ids in reader.batches(order.train_ids[low:high] for low, high in ranges):
            if augmented:
                seed = int(hash64(order.seed, RELABEL))
                view_ids = spec.view_ids[:1]
                made = views.make_views(
                    pixels, heights, widths, ids, spec, view_ids, seed, step, pool=pool, threads=plan.threads
                )[0]
            else:
                data = plan.config.data
                made = views.test_views(
                    pixels,
                    heights,
                    widths,
                    spec.size,
                    _resize(data, spec.size),
                    data.eval_interpolation,
                    pool=pool,
                    threads=plan.threads,
                )
            keys = row_keys(hash64(order.seed, DROPOUT, RELABEL, step), np.zeros(1, np.int64), ids)
            with keyed_rows(_as_tensor(keys)):
                found = at_least_float32(network(to_input(torch.from_numpy(made).to(world.device))))
            if values is None:
                values = found.new_empty(len(positions), *found.shape[1:])
            values[done : done + len(found)] = found
            done += len(found)
            world.state.phase = f"{PHASE}, of image {done}"  # another name: the time limit is that of a batch
            progress.update(len(found))
    network.train(mode)
    with world.state.phase_of(f"{PHASE}, of the other ranks", STUCK):
        world.barrier()  # one that reads from a slower disk may be far behind
    return Rows(torch.from_numpy(positions).to(world.device), values)


def _in_evaluation(world: World, count: int) -> Iterator[tuple[int, int]]:
    low, high = world.share(count)
    return ((start, min(start + BATCH, high)) for start in range(low, high, BATCH))


def _in_training(world: World, count: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """This rank's even part of every batch."""
    assert world.grid.views == 1, "methods that relabel keep all views of an image on one rank"
    for start in range(0, count - batch_size + 1, batch_size):
        stop = start + batch_size if start + 2 * batch_size <= count else count
        low, high = world.share(stop - start)
        yield start + low, start + high


def _resize(data, size: int) -> int | None:
    """The short side before the centre crop, in the proportion of the evaluation's transform."""
    return None if data.eval_resize is None else max(size, data.eval_resize * size // data.image_size)


def _as_tensor(keys: np.ndarray) -> Tensor:
    return torch.from_numpy(keys.view(np.int64).ravel())
