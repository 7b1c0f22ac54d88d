"""SwAV: swapping assignments between views (Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, NeurIPS 2020,
arXiv:2006.09882).

Every view of an image predicts the prototypes that other views of it are assigned to. Assignments come from the large
crops alone: by the optimal transport of a batch to prototypes of equal size, after a few iterations of Sinkhorn-Knopp.
In small batches the transport takes in a queue of embeddings of images before.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from ssl_dist.methods.base import Backbone, Batch, Clock, Extract, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import full_precision
from ssl_dist.nn.queue import Queue


class Options(Section):
    prototypes: PositiveInt = Field(3000, description="K, vectors that views are assigned to")
    hidden: PositiveInt = Field(2048, description="hidden units of the projector")
    dim: PositiveInt = Field(128, description="width of the embeddings")
    temperature: PositiveFloat = Field(0.1, description="what scores of a prediction are divided by")
    epsilon: PositiveFloat = Field(0.05, description="what scores of an assignment are divided by: its smoothness")
    sinkhorn_iterations: PositiveInt = Field(3, description="of an assignment")
    freeze_steps: NonNegativeInt = Field(313, description="first steps in which the prototypes do not learn")
    assign: list[NonNegativeInt] = Field(
        default_factory=lambda: [0, 1],
        min_length=1,
        description="views, counted over all groups, that are assigned; the others predict",
    )
    queue: NonNegativeInt = Field(0, description="embeddings in the queue of each assigned view; 0: none")
    queue_from_epoch: NonNegativeFloat = Field(
        15.0, description="from when on the queue is filled; it is used when full"
    )


@torch.no_grad()
def assignments(scores_NK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Soft assignments [N, K] whose rows sum to 1 and whose columns, after enough iterations, to N / K: the transport
    of appendix A from exp(scores / epsilon)."""
    num_rows, num_columns = scores_NK.shape
    q_NK = (scores_NK / epsilon).exp()
    q_NK /= q_NK.sum()
    for _ in range(iterations):
        q_NK /= q_NK.sum(0) * num_columns
        q_NK /= q_NK.sum(1, keepdim=True) * num_rows
    return q_NK * num_rows


def swapped(
    scores_NK: Tensor, target_AMK: Tensor, assigned: list[int], temperature: float, num_views: int, first: int = 0
) -> Tensor:
    """What rows first, first + 1, ... of the V x M views, view-major, add to the loss (equation 2) by their scores: the
    mean over assigned views and the other views of the cross-entropy of an image's prediction with its assignment."""
    num_images = target_AMK.shape[1]
    rows = first + torch.arange(len(scores_NK), device=scores_NK.device)
    view, image = rows // num_images, rows % num_images
    log_probability = (scores_NK / temperature).log_softmax(1)
    total = scores_NK.new_zeros(())
    for target_MK, of_view in zip(target_AMK, assigned, strict=True):
        cross_entropy = -(target_MK[image] * log_probability).sum(1)
        total = total + cross_entropy.masked_fill(view == of_view, 0).sum()
    return total / (len(assigned) * (num_views - 1) * num_images)


class Method(SSLMethod[Options]):
    """views.groups: the large crops, then, if any, the small ones."""

    free_views = True

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.num_views = info.views_compared("swav")
        info.require_views("assign", options.assign)
        info.require_two_images("the projector's BatchNorm needs another image")
        self.projector = self.mlp_on_features([options.hidden, options.dim], last_bias=True)
        self.prototypes = nn.Parameter(nn.Linear(options.dim, options.prototypes, bias=False).weight.detach())
        queues = [Queue(options.queue, options.dim, info.seed) for _ in options.assign] if options.queue else []
        self.queues: list[Queue] = queues
        for number, queue in enumerate(queues):
            self.add_module(f"queue{number}", queue)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        options, rows = self.options, self.num_views * self.info.batch_size
        scores = self.info.batch_size * len(options.assign) + options.queue
        return {
            "predictions": f"{-(-rows // world_size)} of {rows} a rank, of {options.prototypes} prototypes",
            "assignments": f"{len(options.assign)} of {self.num_views} views, each of {self.info.batch_size} images"
            + (f" and {options.queue} of the queue" if options.queue else "")
            + f"; {scores * options.prototypes * 4 / 2**20:.1f} MiB on every rank",
        }

    @torch.no_grad()
    def before_step(self, clock: Clock, extract: Extract, world: World) -> list[nn.Parameter]:
        """The prototypes become unit vectors again."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        return []

    def frozen(self, clock: Clock) -> list[nn.Parameter]:
        return [self.prototypes] if clock.step < self.options.freeze_steps else []

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the entropy of the mean assignment, 1 when all prototypes are used equally, and the mean entropy of
        an assignment, which at 1 is to all of them alike: a collapse, against which a lower epsilon helps."""
        options = self.options
        z_VMD = F.normalize(self.projected(batch, world, self.projector), dim=-1)
        with full_precision(z_VMD.device):
            target_AMK = torch.stack(
                [self._assigned(z_VMD[v].detach(), a, batch) for a, v in enumerate(options.assign)]
            )
            lo, hi = world.share(z_VMD.shape[0] * z_VMD.shape[1])
            scores = z_VMD.flatten(0, 1)[lo:hi] @ self.prototypes.to(z_VMD.dtype).T
            share = swapped(scores, target_AMK, options.assign, options.temperature, self.num_views, lo)
        self._new = [z_VMD[v].detach() for v in options.assign]
        usage_K, unit = target_AMK.flatten(0, 1).mean(0), math.log(max(2, options.prototypes))
        metrics: dict[str, float | Tensor] = {
            "prototype_entropy": -torch.xlogy(usage_K, usage_K).sum() / unit,
            "assignment_entropy": -torch.xlogy(target_AMK, target_AMK).sum(-1).mean() / unit,
        }
        return Output(world.scale_for_ddp_mean(share), metrics, representations=z_VMD.detach())

    def _assigned(self, z_MD: Tensor, queue: int, batch: Batch) -> Tensor:
        """Soft assignments [M, K] of the embeddings of one view, among those of its queue once that is full."""
        options = self.options
        pushed = (batch.step - self._queue_starts()) * self.info.batch_size
        before = [self.queues[queue].rows.to(z_MD.dtype)] if options.queue and pushed >= options.queue else []
        scores = torch.cat([*before, z_MD]) @ self.prototypes.detach().to(z_MD.dtype).T
        return assignments(scores, options.epsilon, options.sinkhorn_iterations)[-len(z_MD) :]

    def _queue_starts(self) -> int:
        """The first step whose embeddings the queue gets."""
        return math.ceil(self.options.queue_from_epoch * self.info.steps_per_epoch)

    def after_step(self, clock: Clock) -> None:
        step = clock.step - 1 - self._queue_starts()
        if step >= 0:
            for queue, new in zip(self.queues, self._new, strict=False):
                queue.push(new, step)
