"""One method on a grid of ranks that are threads, as the training loop would run it."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_dist.methods.base import Batch, Info, Output
from tests import thread_world


class Backbone(nn.Module):
    """Linear and BatchNorm: wrong statistics or gradients across ranks would show."""

    feature_dim = 6

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(5, self.feature_dim, bias=False), nn.BatchNorm1d(self.feature_dim)

    def forward(self, x):
        return self.bn(self.linear(x))


@dataclass
class StepResult:
    loss: Tensor  # of the global batch
    gradients: dict[str, Tensor]  # averaged over the ranks, as DDP does
    buffers: list[dict[str, Tensor]]  # of every rank
    outputs: list[Output]


def batch_of(*groups, labels=None, images=None, view_ids=None):
    """One rank's batch of views [V, B, inputs], a tensor a group; images, view_ids: the ids, 0, 1, ... by default."""
    if view_ids is None:
        view_ids = torch.arange(sum(map(len, groups))).split([len(group) for group in groups])
    images = torch.arange(groups[0].shape[1]) if images is None else images
    return Batch(list(groups), list(view_ids), images, labels, images)


def explained(module, num_views, batch_size, world_size=1, device="cpu", **options):
    """What `ssl-dist explain` shows of the method of `module`: name -> text."""
    info = Info(1000, 10, ((num_views, 32),), batch_size, 1.0, Backbone.feature_dim, {"layer1": 8})
    with torch.device("meta"):
        return module.Method(Backbone(), info, module.Options(**options)).explain(world_size, device)


def gradients(method):
    return {name: p.grad.clone() for name, p in method.named_parameters()}


def run(method, grid, *groups, labels=None):
    """The step of a copy of `method` on every rank. labels: of the images of the global batch."""
    num_images = groups[0].shape[1]

    def rank(world):
        own = world.synchronize_batchnorm(copy.deepcopy(method)).train()
        images = slice(*_ends(grid.image_range(world.rank_info.rank, num_images)))
        views = [slice(*_ends(grid.view_range(world.rank_info.rank, len(group)))) for group in groups]
        local = [group[of_rank, images] for group, of_rank in zip(groups, views, strict=True)]
        all_ids = torch.arange(sum(map(len, groups))).split([len(group) for group in groups])
        view_ids = [ids[of_rank] for ids, of_rank in zip(all_ids, views, strict=True)]
        own_labels = None if labels is None else labels[images]
        own_images = torch.arange(num_images)[images]
        output = own(batch_of(*local, labels=own_labels, images=own_images, view_ids=view_ids), world)
        output.loss.backward()
        return output, gradients(own), dict(own.named_buffers())

    outputs, of_ranks, buffers = zip(*thread_world.run(rank, grid), strict=True)
    mean = {name: torch.stack([g[name] for g in of_ranks]).mean(0) for name in of_ranks[0]}
    return StepResult(torch.stack([o.loss.detach() for o in outputs]).mean(), mean, list(buffers), list(outputs))


def assert_equal(result, loss, gradients, buffers, tolerance):
    """The step is that of a reference: loss, gradients by name, and buffers by name on every rank."""
    torch.testing.assert_close(result.loss, loss, **tolerance)
    assert result.gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(result.gradients[name], expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for of_rank in result.buffers:
        for name, expected in buffers.items():
            torch.testing.assert_close(of_rank[name], expected, **tolerance)


def _ends(places):
    return places.start, places.stop
