"""SimSiam: simple siamese networks (Chen & He, CVPR 2021, arXiv:2011.10566).

Two views of every image pass one network. A predictor turns the embedding of the one view into that of the other, which
has no gradient: without a target network, without negative pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveInt, Section
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import beside_prediction, full_precision, mlp


class Options(Section):
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [2048, 2048, 2048],
        min_length=1,
        description="widths of the projector's layers; the last is that of the embeddings",
    )
    predictor: PositiveInt = Field(512, description="hidden units of the predictor")
    constant_predictor_lr: bool = Field(
        True, description="the predictor keeps the highest rate, whatever optim.schedule does, as in the official code"
    )


def negative_cosine(predicted_VBD: Tensor, z_VBD: Tensor) -> Tensor:
    """Minus the mean cosine of each view's prediction and the other view's embedding (equations 1 to 3)."""
    z_VBD = z_VBD.detach()
    of_first = F.cosine_similarity(predicted_VBD[0], z_VBD[1], dim=1).mean()
    of_second = F.cosine_similarity(predicted_VBD[1], z_VBD[0], dim=1).mean()
    return -(of_first + of_second) / 2


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("the projector's BatchNorm needs another image")
        dim = options.projector[-1]
        self.projector = nn.Sequential(self.mlp_on_features(options.projector), nn.BatchNorm1d(dim, affine=False))
        self.predictor = mlp([dim, options.predictor, dim], last_bias=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        predictor = [*self.predictor.parameters()]
        others = [p for part in (self.backbone, self.projector) for p in part.parameters() if p.requires_grad]
        return [{"params": others}, {"params": predictor, "constant_lr": self.options.constant_predictor_lr}]

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the mean over dimensions of the standard deviation of unit embeddings, times sqrt(D): 1 where they
        spread over the sphere, 0 where they have collapsed (section 4.1)."""
        both = torch.cat(
            self.represent(batch, lambda x: beside_prediction(self.projector(self.backbone(x)), self.predictor))
        )
        z_VBD, predicted_VBD = both.chunk(2, dim=-1)
        with full_precision(z_VBD.device):
            # Ranks hold equally many images, so the mean of their means is that of the global batch.
            loss = negative_cosine(predicted_VBD, z_VBD)
        z_KMD = world.gather_views(z_VBD.detach())
        spread = F.normalize(z_KMD.flatten(0, 1), dim=1).std(0).mean() * z_KMD.shape[-1] ** 0.5
        return Output(loss, {"spread": spread}, representations=z_KMD)
