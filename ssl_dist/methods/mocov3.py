"""MoCo v3 (Chen, Xie & He, ICCV 2021, arXiv:2104.02057): momentum contrast without a queue.

Two views of every image pass an online network, which ends in a predictor, and a target network, which is a moving
average of it and has no gradient. From its view of an image the online network picks the target's other view of the
same image out of those of the whole batch.

As in the official code the loss is multiplied by twice the temperature.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, PositiveInt, Probability, Section
from ssl_dist.methods.base import Backbone, Batch, Clock, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import ema_update, full_precision, mlp, rising_decay, target_network


class Options(Section):
    temperature: PositiveFloat = Field(1.0, description="what cosine similarities are divided by; ViTs: 0.2")
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [4096, 256],
        min_length=1,
        description="widths of the projector's layers, the embedding's the last; ViTs: [4096, 4096, 256]",
    )
    predictor: PositiveInt = Field(4096, description="hidden units of the predictor")
    predictor_end: Literal["linear", "batchnorm"] = Field(
        "linear", description="what the predictor ends with; ViTs: batchnorm, as the official code has them"
    )
    momentum: Probability = Field(0.99, description="share of the target that the first average keeps")
    momentum_cosine: bool = Field(True, description="that share rises to 1 by half a cosine; false: it is constant")


def picks(query_MD: Tensor, key_MD: Tensor, temperature: float, lo: int = 0, hi: int | None = None) -> Tensor:
    """Logits [hi - lo, M] of the queries lo..hi-1: cosine similarity to each key, divided by the temperature. The
    answer of query i is key i."""
    return F.normalize(query_MD, dim=1)[lo:hi] @ F.normalize(key_MD, dim=1).T / temperature


def contrast(query_KMD: Tensor, key_KMD: Tensor, temperature: float, world: World) -> tuple[Tensor, Tensor]:
    """A loss whose mean over the ranks is that of two views [2, M, D] of the global batch (equation 1, both ways, times
    2 T), and the accuracy in percent; each rank takes its even share of the queries."""
    num_images = query_KMD.shape[1]
    lo, hi = world.share(num_images)
    answers = torch.arange(lo, hi, device=query_KMD.device)
    share, correct = query_KMD.new_zeros(()), torch.zeros((), dtype=torch.int64, device=query_KMD.device)
    for query_MD, key_MD in ((query_KMD[0], key_KMD[1]), (query_KMD[1], key_KMD[0])):
        logits = picks(query_MD, key_MD, temperature, lo, hi)
        share = share + F.cross_entropy(logits, answers, reduction="sum") / num_images
        correct = correct + (logits.detach().argmax(1) == answers).sum()
    accuracy = 100 * world.all_reduce_sum(correct) / (2 * num_images)
    return world.scale_for_ddp_mean(2 * temperature * share), accuracy


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False
    fixed_length = True  # momentum

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("mocov3 tells an image from others of the batch")
        dim = options.projector[-1]
        self.projector = nn.Sequential(self.mlp_on_features(options.projector), nn.BatchNorm1d(dim, affine=False))
        predictor: list[nn.Module] = [mlp([dim, options.predictor, dim])]
        if options.predictor_end == "batchnorm":
            predictor.append(nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(*predictor)
        self.target_backbone = target_network(backbone)
        self.target_projector = target_network(self.projector)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        rows = self.info.batch_size
        return {
            "instance task": f"1 of {rows} images, {-(-rows // world_size)} queries of a view a rank; temperature "
            f"{self.options.temperature:g}",
            "target": f"a moving average from momentum {self.options.momentum:g} on",
        }

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: how often the query's image is the most similar key, in percent, and momentum of the coming
        average."""
        with torch.no_grad():
            key_KMD = self.gathered(batch, world, lambda x: self.target_projector(self.target_backbone(x)))
        query_KMD = self.gathered(batch, world, lambda x: self.predictor(self.projector(self.backbone(x))))
        with full_precision(query_KMD.device):
            loss, accuracy = contrast(query_KMD, key_KMD, self.options.temperature, world)
        metrics: dict[str, float | Tensor] = {"accuracy": accuracy, "momentum": self._momentum(batch.step + 1)}
        return Output(loss, metrics, representations=query_KMD.detach())

    def _momentum(self, step: int) -> float:
        """Of the average that the official code makes at the start of step number `step`, after the update before."""
        total = self.info.steps_per_epoch * self.info.total_epochs
        return (
            rising_decay(step / total, self.options.momentum) if self.options.momentum_cosine else self.options.momentum
        )

    def after_step(self, clock: Clock) -> None:
        momentum = self._momentum(clock.step)
        ema_update(self.target_backbone, self.backbone, momentum)
        ema_update(self.target_projector, self.projector, momentum)
