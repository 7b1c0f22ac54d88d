"""Alignment and uniformity on the hypersphere (Wang & Isola, ICML 2020, arXiv:2005.10242).

Two views of every image of a mini-batch are embedded on the unit sphere. The loss draws the two embeddings of an image
together and spreads the images over the sphere, like charges that repel each other by a Gaussian potential. The
defaults are those of the SFRIK paper (arXiv:2208.00789), where the method is called AUH.
"""

import math

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_dist.config import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import full_precision


class Options(Section):
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [8192, 8192, 8192],
        min_length=1,
        description="widths of the projector's layers; the last is that of the embeddings",
    )
    sim_coeff: NonNegativeFloat = Field(
        3000.0, description="weight of the alignment, a mean over dimensions: it goes with the embedding's width"
    )
    unif_coeff: NonNegativeFloat = Field(1.0, description="weight of the uniformity")
    scale: PositiveFloat = Field(2.5, description="t of the potential exp(-t |x - y|^2)")


def uniformity(z_MD: Tensor, scale: float) -> Tensor:
    """log mean_{i != j} exp(-scale |z_i - z_j|^2) of unit rows (section 4.1.2); |z_i - z_j|^2 = 2 - 2 <z_i, z_j>."""
    exponents = -2 * scale * (1 - z_MD @ z_MD.T)
    exponents.fill_diagonal_(-math.inf)
    num_images = len(z_MD)
    return exponents.flatten().logsumexp(0) - math.log(num_images * (num_images - 1))


def aligned(z_KMD: Tensor, options: Options) -> tuple[Tensor, dict[str, float | Tensor]]:
    """The loss of two views [2, M, D] of the global batch, and its unweighted terms. It is small work on [M, M], and
    computed in full on every rank."""
    x_MD, y_MD = F.normalize(z_KMD, dim=-1)
    alignment = F.mse_loss(x_MD, y_MD)
    spread = (uniformity(x_MD, options.scale) + uniformity(y_MD, options.scale)) / 2
    loss = options.sim_coeff * alignment + options.unif_coeff * spread
    return loss, {"alignment": alignment.detach(), "uniformity": spread.detach()}


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("uniformity needs another image")
        self.projector = self.mlp_on_features(options.projector)

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the unweighted terms."""
        z_KMD = self.gathered(batch, world, lambda images: self.projector(self.backbone(images)))
        with full_precision(z_KMD.device):
            loss, terms = aligned(z_KMD, self.options)
        return Output(loss, terms, representations=z_KMD.detach())
