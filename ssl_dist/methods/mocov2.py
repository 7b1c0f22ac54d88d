"""MoCo v2: momentum contrast with a queue (Chen, Fan, Girshick & He, 2020, arXiv:2003.04297), after He, Fan, Wu, Xie &
Girshick (CVPR 2020, arXiv:1911.05722).

From its view of an image an online network picks a target network's other view of it out of that and of a queue of the
target's embeddings of images before. The target is a moving average of the online network and has no gradient.

The official code shuffles images over the GPUs, so that no batch statistics of a GPU tell which image is which; here
they are those of the whole batch, on any number of GPUs.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, PositiveInt, Probability, Section
from ssl_dist.methods.base import Backbone, Batch, Clock, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import ema_update, full_precision, target_network
from ssl_dist.nn.queue import Queue


class Options(Section):
    temperature: PositiveFloat = Field(0.2, description="what cosine similarities are divided by")
    queue: PositiveInt = Field(65536, description="embeddings in the queue")
    hidden: PositiveInt = Field(2048, description="hidden units of the projector")
    dim: PositiveInt = Field(128, description="width of the embeddings")
    momentum: Probability = Field(0.999, description="share of the target that an average keeps")


def logits(query_ND: Tensor, key_ND: Tensor, queue_QD: Tensor, temperature: float) -> Tensor:
    """[N, 1 + Q]: cosine of each query and its key, then and the queue's unit vectors, divided by the temperature."""
    query_ND, key_ND = F.normalize(query_ND, dim=1), F.normalize(key_ND, dim=1)
    own = (query_ND * key_ND).sum(1, keepdim=True)
    return torch.cat([own, query_ND @ queue_QD.T], 1) / temperature


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.projector = nn.Sequential(
            nn.Linear(info.feature_dim, options.hidden), nn.ReLU(), nn.Linear(options.hidden, options.dim)
        )
        self.target_backbone = target_network(backbone)
        self.target_projector = target_network(self.projector)
        self.queue = Queue(options.queue, options.dim, info.seed)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        size, dim = self.queue.rows.shape
        return {
            "queue": f"{size} embeddings, {size / self.info.batch_size:.0f} steps, {size * dim * 4 / 2**20:.1f} MiB",
            "target": f"a moving average, momentum {self.options.momentum:g}",
        }

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: how often the key is more similar than all of the queue, in percent."""
        first, second = (self._one(batch, view) for view in (0, 1))
        [[query_BD]] = self.represent(first, lambda x: self.projector(self.backbone(x)))
        with torch.no_grad():
            [[key_BD]] = self.represent(second, lambda x: self.target_projector(self.target_backbone(x)))
        with full_precision(query_BD.device):
            z = logits(query_BD, key_BD, self.queue.rows.to(query_BD.dtype), self.options.temperature)
            # Ranks hold equally many images, so the mean of their means is that of the global batch.
            loss = F.cross_entropy(z, torch.zeros(len(z), dtype=torch.int64, device=z.device))
        self._new = world.gather_images(key_BD)
        accuracy = 100 * world.all_reduce_mean((z.detach().argmax(1) == 0).double().mean())
        return Output(loss, {"accuracy": accuracy}, representations=self._new)

    def _one(self, batch: Batch, view: int) -> Batch:
        """The batch with this view alone, whatever group it is of."""
        parts = [
            (views[v : v + 1], ids[v : v + 1])
            for views, ids in zip(batch.views, batch.view_ids, strict=True)
            for v in range(len(views))
        ]
        views, ids = parts[view]
        return replace(batch, views=[views], view_ids=[ids])

    def after_step(self, clock: Clock) -> None:
        self.queue.push(self._new, clock.step - 1)
        ema_update(self.target_backbone, self.backbone, self.options.momentum)
        ema_update(self.target_projector, self.projector, self.options.momentum)
