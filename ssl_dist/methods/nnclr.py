"""NNCLR: with a little help from my friends (Dwibedi, Aytar, Tompson, Sermanet & Zisserman, ICCV 2021,
arXiv:2104.14548).

Two views of every image are embedded. In the place of a view's embedding stands the most similar one of a support set,
embeddings of images before; the prediction of the other view of its image is to be told from those of the other images
of the batch. The support set is a queue of the embeddings of the first views.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, PositiveInt, Section
from ssl_dist.methods.base import Backbone, Batch, Clock, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import beside_prediction, full_precision, mlp
from ssl_dist.nn.queue import Queue


class Options(Section):
    temperature: PositiveFloat = Field(0.1, description="what cosine similarities are divided by")
    support: PositiveInt = Field(98304, description="embeddings in the support set")
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [2048, 2048, 256],
        min_length=1,
        description="widths of the projector's layers; the last is that of the embeddings",
    )
    predictor: PositiveInt = Field(4096, description="hidden units of the predictor")


def nearest(z_ND: Tensor, support_QD: Tensor) -> Tensor:
    """The row of the support set, unit vectors, with the largest cosine to each row of z (equation 3), [N, D]."""
    return support_QD[(F.normalize(z_ND, dim=1) @ support_QD.T).argmax(1)]


def contrast(neighbour_KND: Tensor, predicted_KMD: Tensor, temperature: float, lo: int) -> tuple[Tensor, Tensor]:
    """The sums over the neighbours [2, N, D] of the images lo..lo+N-1 of the cross-entropy with which they pick their
    image's prediction of the other view out of those of all images [2, M, D] (equation 4), the mean of both ways; and
    how many are picked correctly."""
    predicted_KMD = F.normalize(predicted_KMD, dim=-1)
    answers = lo + torch.arange(neighbour_KND.shape[1], device=neighbour_KND.device)
    losses, correct = [], []
    for neighbour_ND, predicted_MD in zip(neighbour_KND, predicted_KMD.flip(0), strict=True):
        logits = neighbour_ND @ predicted_MD.T / temperature
        losses.append(F.cross_entropy(logits, answers, reduction="sum"))
        correct.append((logits.detach().argmax(1) == answers).sum())
    return torch.stack(losses).mean(), torch.stack(correct).sum()


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("nnclr tells an image from others of the batch")
        dim = options.projector[-1]
        self.projector = nn.Sequential(self.mlp_on_features(options.projector), nn.BatchNorm1d(dim))
        # The predictor's BatchNorm takes away what this would add. Its gradient is 0, computed rounding noise, which
        # Adam makes as large as the learning rate and different for every number of ranks.
        self.projector[-1].bias.requires_grad_(False)
        self.predictor = mlp([dim, options.predictor, dim], last_bias=True)
        self.support = Queue(options.support, dim, info.seed)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        size, dim = self.support.rows.shape
        return {
            "support set": f"{size} embeddings, {size / self.info.num_images:.1f} epochs of images, "
            f"{size * dim * 4 / 2**20:.1f} MiB"
        }

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: how often a neighbour picks its image, in percent, and the mean cosine of an embedding and its
        neighbour."""
        both_KMD = self.gathered(
            batch, world, lambda x: beside_prediction(self.projector(self.backbone(x)), self.predictor)
        )
        z_KMD, predicted_KMD = both_KMD.chunk(2, dim=-1)
        z_KMD = z_KMD.detach()
        num_images = z_KMD.shape[1]
        lo, hi = world.share(num_images)
        with full_precision(z_KMD.device):
            own_KND = z_KMD[:, lo:hi]
            neighbour_KND = torch.stack([nearest(z_ND, self.support.rows.to(z_ND.dtype)) for z_ND in own_KND])
            total, correct = contrast(neighbour_KND, predicted_KMD, self.options.temperature, lo)
            cosines = F.cosine_similarity(own_KND, neighbour_KND, dim=-1).sum()
        sums = world.all_reduce_sum(torch.stack([correct.to(cosines.dtype), cosines])) / (2 * num_images)
        self._new = z_KMD[0]
        metrics = {"accuracy": 100 * sums[0], "neighbour_cosine": sums[1]}
        return Output(world.scale_for_ddp_mean(total / num_images), metrics, representations=z_KMD)

    def after_step(self, clock: Clock) -> None:
        self.support.push(self._new, clock.step - 1)
